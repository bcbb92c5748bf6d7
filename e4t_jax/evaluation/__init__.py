"""How likeness and obedience are measured, in any domain."""
