"""How the world's base model is trained and checked."""
