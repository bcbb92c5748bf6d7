"""To and from what others use: diffusers (out), the public PyTorch implementation (in)."""
