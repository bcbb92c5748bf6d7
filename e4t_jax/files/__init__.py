"""Domains and concepts on disk."""
