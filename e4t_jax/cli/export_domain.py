"""Writes a domain as a checkpoint of the public PyTorch implementation of E4T.

e4t export-domain --domain DOMAIN --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from e4t_jax.cli.run import Command
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.e4t_diffusion import export_domain
from e4t_jax.storage import check_writable


@dataclass(frozen=True)
class Config(Command):
    """Export a domain: weight_offsets.pt, encoder.pt and config.json of the public PyTorch implementation (needs PyTorch).

    `e4t import-reference` reads the folder back, with the same numbers.
    """

    example = "e4t export-domain --domain faces --out outputs/checkpoint"

    out: Path
    """Folder to write."""
    domain: str = "creatures"
    """The domain; its encoder must see tokens of CLIP's last layer (`e4t pretrain --clip-features tokens`)."""


def main(config: Config) -> None:
    check_writable(config.out)
    exported = export_domain(load_domain(config.domain), config.out)
    print("\n".join([f"Wrote {config.out}", *exported.notes]))
