"""Checkpoints of the public PyTorch implementation (mkshing/e4t-diffusion) as domains and concepts.

settings    config.json
files       .pt files: read and checked
tensors     their tensors as encoder, offsets and image encoder
checkpoint  the domain and concept of a whole checkpoint
"""

from e4t_jax.interop.e4t_diffusion.checkpoint import ImportedCheckpoint, import_checkpoint

__all__ = ["ImportedCheckpoint", "import_checkpoint"]
