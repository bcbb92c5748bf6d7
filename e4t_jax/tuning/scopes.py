"""What tuning may change: one row a scope.

compact   the word's residual r and rank-1 factors of Δ; the encoder stays the domain's: some kilobytes
head      the encoder and rank-3 factors
full      the encoder, rank-3 factors and every weight of the U-Net: the paper's literal form
"""

from __future__ import annotations

import dataclasses

from e4t_jax.errors import UserError
from e4t_jax.offsets import LOW_RANK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """The parts that learn, and their rates (`training.optimizers.step_lengths`), which were chosen on validation identities."""

    parts: tuple[str, ...]  # fields of `objective.Trainable`; each begins as `objective.INITIAL_PARTS` says
    rank: int  # of the concept's own factors
    form: str = LOW_RANK  # of the concept's own offsets, a row of `offsets.FORMS`
    learning_rate: float  # of all parts but the word's residual: what share of the weights the first step moves
    word_rate: float = 0.0  # what share of the domain word's length the first step of that residual moves
    # Whether the encoder predicts the word anew for every draw, with a gradient through φ_unet. That costs a quarter of a step;
    # where the encoder does not learn, the likeness is the same without (docs/benchmarks.md).
    fresh_word: bool = True
    brings: tuple[str, ...] = ()  # parts that a concept may hold beside, if another recipe trained them


SCOPES: dict[str, Scope] = {
    "compact": Scope(parts=("factors", "residual"), rank=1, learning_rate=0.005, word_rate=0.0484, fresh_word=False),
    "head": Scope(parts=("factors", "encoder"), rank=3, learning_rate=0.005),
    "full": Scope(parts=("factors", "encoder", "unet"), rank=3, learning_rate=0.002, brings=("text_encoder",)),
}


def find_scope(name: str) -> Scope:
    """The row of that name.

    Errors: `UserError` for another name.
    """
    if name not in SCOPES:
        raise UserError(f"{name!r} is unknown; choose one of {', '.join(SCOPES)}.", "scope")
    return SCOPES[name]
