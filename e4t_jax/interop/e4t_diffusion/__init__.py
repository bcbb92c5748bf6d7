"""Checkpoints of the public PyTorch implementation (mkshing/e4t-diffusion) as domains and concepts.

settings        config.json
files           .pt files: read and checked
tensors         their tensors as encoder, offsets and image encoder
locate          where a checkpoint and its base lie: folders, or the Hub
trained_on      whether the base given is the one it was trained on
checkpoint      the domain and concept of a whole checkpoint
public_domains  "faces": the public checkpoint by name
export          a domain as a checkpoint: write_tensors, nearest_network, own_numbers
"""

from e4t_jax.interop.e4t_diffusion.checkpoint import ImportedCheckpoint, import_checkpoint
from e4t_jax.interop.e4t_diffusion.export import ExportedDomain, export_domain

__all__ = ["ExportedDomain", "ImportedCheckpoint", "export_domain", "import_checkpoint"]
