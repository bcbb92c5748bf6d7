"""A concept's change of the U-Net as a LoRA, in the names that ComfyUI, A1111, InvokeAI, SD.Next, kohya and diffusers read.

Our change W' = W ⊙ (1 + Δ) is an entrywise product, so the update W ⊙ Δ is not of low rank though Δ is. What a LoRA holds is the
best update of one rank, from the singular value decomposition W ⊙ Δ = Σ_i s_i u_i v_iᵀ:

    W' ≈ W + (alpha / rank) down up,    down = [√s_i u_i]_{i < rank},    up = [√s_i v_i]ᵀ,    alpha = rank
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from e4t_jax import bases
from e4t_jax.checks import Between, Whole, check_range
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError
from e4t_jax.offsets import delta

RANK = Whole(1, 10**9)  # beyond a kernel's smaller side it gains nothing, and is not taken
ERROR = Between(0, 1)


class Lora(NamedTuple):
    """Low-rank updates of the U-Net's attention in kohya's names, and what they miss: ‖W ⊙ Δ - down up‖ / ‖W ⊙ Δ‖."""

    tensors: dict[str, np.ndarray]
    rank: int
    error: float

    @property
    def kept(self) -> float:
        """The share of ‖W ⊙ Δ‖² that the updates hold: 1 - error²."""
        return 1 - self.error**2


def kohya_name(path: str) -> str:
    """A kernel's name in kohya's networks/lora.py: "lora_unet_" and PyTorch's name of the module, its dots as underscores.

    "down_blocks_0/…/attn1/to_q" -> "lora_unet_down_blocks_0_…_attn1_to_q"; two modules never share a name.
    """
    return "lora_unet_" + bases.torch_name("unet", f"{path}/kernel").removesuffix(".weight").replace(".", "_")


def lora(domain: Domain, concept: Concept, rank: int | None = None, error: float = 0.05) -> Lora:
    """The best update of each attention kernel of one rank: the truncated singular value decomposition of W ⊙ Δ.

    Where no rank is given, it is the smallest that misses no more than `error`; never one that gains nothing.

    Errors: `UserError` for a concept of scope "full", whose U-Net differs everywhere, and for numbers out of range.
    """
    if concept.trainable.unet is not None:
        raise UserError(f"{concept.name} is of scope full, which no LoRA can hold; write a whole model.", "format")
    check_range("rank", rank, RANK)
    check_range("error", error, ERROR)
    parts = {path: np.linalg.svd(change, full_matrices=False) for path, change in _changes(domain, concept).items()}
    # What every rank misses, over all kernels: readers take ONE rank for all of them.
    largest = max(len(sizes) for _, sizes, _ in parts.values())
    padded = [np.pad(np.square(sizes, dtype=np.float64), (0, largest - len(sizes))) for _, sizes, _ in parts.values()]
    squares = np.sum(padded, axis=0)
    missed = np.sqrt(np.append(squares[::-1].cumsum()[::-1], 0) / max(squares.sum(), 1e-300))
    rank = min(rank, largest) if rank is not None else max(1, int(np.argmax(missed <= error)))
    tensors: dict[str, np.ndarray] = {}
    for path, (left, sizes, right) in parts.items():
        roots = np.sqrt(sizes[:rank])
        fill = ((0, 0), (0, rank - len(roots)))  # a kernel of a smaller rank is filled up with zeros
        name = kohya_name(path)
        # Kernels are [in, out] here and [out, in] in PyTorch, so the sides change places.
        tensors[f"{name}.lora_down.weight"] = np.ascontiguousarray(np.pad(left[:, :rank] * roots, fill).T)
        tensors[f"{name}.lora_up.weight"] = np.ascontiguousarray(np.pad(right[:rank].T * roots, fill))
        tensors[f"{name}.alpha"] = np.array(rank, np.float32)
    return Lora(tensors, rank, float(missed[rank]))


def _changes(domain: Domain, concept: Concept) -> dict[str, np.ndarray]:
    """W ⊙ Δ [in, out] of every kernel that domain and concept change, Δ being the sum of theirs.

    Errors: `UserError` where they change none.
    """
    sets = [factors for factors in (domain.factors, concept.trainable.factors) if factors]
    kernels = domain.base.offset_kernels(domain.params["unet"])
    changes = {
        path: np.asarray(kernels[path]) * np.asarray(sum(delta(factors[path]) for factors in sets if path in factors))
        for path in sorted({path for factors in sets for path in factors})
    }
    if not changes:
        raise UserError(f"{concept.name} changes no weights of the U-Net: its word alone says all; write an embedding.", "format")
    return changes
