"""Writes a concept for diffusers' PyTorch pipelines.

python -m infer.export --concept DIR/venus.safetensors --format diffusers|lora|embedding --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from safetensors.numpy import save

from e4t_jax import bases
from e4t_jax.cli.shared import Command
from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.diffusers import ERROR, RANK, check_token, constant_word, lora, merged_base
from e4t_jax.storage import check_writable, write_file
from e4t_jax.words import PLACEHOLDER


@dataclass(frozen=True)
class Config(Command):
    """Export a concept: a whole model (diffusers), the U-Net's change (lora), or the word alone (embedding).

    The word, predicted anew at every step here, becomes one constant: its mean along sampling trajectories.
    """

    concept: Path
    """Concept file that train.tune wrote."""
    out: Path
    """Folder to write."""
    format: Literal["diffusers", "lora", "embedding"] = "diffusers"
    """diffusers: StableDiffusionPipeline.from_pretrained; lora: load_lora_weights; embedding: load_textual_inversion."""
    domain: str = "creatures"
    """The domain that the concept was tuned in."""
    rank: Annotated[int, RANK] | None = None
    """Rank of the LoRA; where it is not given, the smallest that misses no more than --error of the change."""
    error: Annotated[float, ERROR] = 0.05
    """What a LoRA may miss: the relative error of its update, over all kernels; 0 for a full rank."""
    token: str = PLACEHOLDER
    """The concept's word in PyTorch's prompts; give each its own, such as <venus>, to use several exports in one pipeline."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the weights."""


def main(config: Config) -> None:
    check_writable(config.out)
    domain = load_domain(config.domain)
    concept = load_concept(config.concept, domain.fingerprint)
    dtype = np.dtype(config.dtype)
    base = bases.local_folder(domain.base_name)
    if config.format == "diffusers" and base is not None and config.out.exists() and config.out.samefile(base):
        raise UserError(f"{config.out} holds the base that the domain was trained on; choose another folder.", "out")
    if config.format == "lora":
        update = lora(domain, concept, config.rank, config.error)
        write_tensors(config.out / "pytorch_lora_weights.safetensors", update.tensors, dtype)
        print(f"Wrote {config.out}, rank {update.rank}: it misses {update.error:.2%} of the change; load its embedding beside it.")
        return
    check_token(domain, config.token)
    word = constant_word(domain, concept)
    if config.format == "embedding":
        write_tensors(config.out / "learned_embeds.safetensors", {config.token: word}, dtype)
    else:
        bases.save_folder(config.out, *merged_base(domain, concept, word, config.token), dtype)
    print(f"Wrote {config.out}; the prompt word is {config.token}")


def write_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: np.dtype) -> None:
    """A safetensors file for PyTorch."""
    write_file(path, save({name: tensor.astype(dtype) for name, tensor in tensors.items()}, {"format": "pt"}))
