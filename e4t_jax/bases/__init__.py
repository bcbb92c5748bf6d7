"""Base models: the networks that the method stands on."""
