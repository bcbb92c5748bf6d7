"""Writes a concept for other tools: diffusers, ComfyUI, A1111, InvokeAI.

e4t export --concept DIR/venus.safetensors --format diffusers|lora|embedding --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from e4t_jax.cli.run import Command
from e4t_jax.files.concept_files import load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.interop.diffusers import export_concept
from e4t_jax.interop.lora import ERROR, RANK
from e4t_jax.storage import check_writable
from e4t_jax.words import PLACEHOLDER


@dataclass(frozen=True)
class Config(Command):
    """Export a concept: a whole model (diffusers), the U-Net's change and the word (lora), or the word alone (embedding).

    The word, predicted anew at every step here, becomes one constant: its mean along sampling trajectories. README.md in the
    folder says where each tool wants which file.
    """

    example = "e4t export --concept outputs/tuned/venus.safetensors --format lora --out outputs/venus_lora"

    concept: Path
    """Concept file that `e4t tune` wrote; in A1111 and ComfyUI its name is the word."""
    out: Path
    """Folder to write."""
    format: Literal["diffusers", "lora", "embedding"] = "diffusers"
    """diffusers: StableDiffusionPipeline.from_pretrained; lora and embedding: diffusers, ComfyUI, A1111, InvokeAI, SD.Next."""
    domain: str = "creatures"
    """The domain that the concept was tuned in."""
    rank: Annotated[int, RANK] | None = None
    """Rank of the LoRA; where it is not given, the smallest that misses no more than --error of the change."""
    error: Annotated[float, ERROR] = 0.05
    """What a LoRA may miss: the relative error of its update, over all kernels; 0 for a full rank."""
    token: str = PLACEHOLDER
    """The concept's word in diffusers' prompts; give each its own, such as <venus>, to use several exports in one pipeline."""
    add_token: bool = True
    """Of a whole model: its tokenizer knows the token; without, the word lies beside the base's own tokenizer and text encoder,
    which converters to a single file ask for."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the weights."""


def main(config: Config) -> None:
    check_writable(config.out)
    domain = load_domain(config.domain)
    exported = export_concept(
        domain,
        load_concept(config.concept, domain.fingerprint),
        config.out,
        format=config.format,
        rank=config.rank,
        error=config.error,
        token=config.token,
        add_token=config.add_token,
        dtype=config.dtype,
    )
    print(f"Wrote {', '.join(exported.files)} and README.md to {config.out}; the word is {exported.token} in diffusers")
    if exported.error is not None:
        print(f"The LoRA has rank {exported.rank}: it misses {exported.error:.2%} of the change")
