"""Judges of likeness and scenes, and trials that they decide."""
