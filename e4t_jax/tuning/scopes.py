"""What tuning may change: one row a scope.

    compact   the word's residual r and rank-1 factors of Δ, in a few bits each; the encoder stays the domain's: some kilobytes
    head      the encoder and rank-3 factors
    full      the encoder, rank-3 factors and every weight of the U-Net: the paper's literal form

A row of `SCOPES` is all that there is of a scope.
"""

from __future__ import annotations

import dataclasses

from e4t_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """The parts that learn, and how long their steps are (see `tuning.tune`); rates were chosen on validation identities."""

    rank: int  # of the concept's own factors
    learning_rate: float  # of factors, encoder and U-Net
    residual: bool = False  # a word's offset of its own, beside the encoder's
    word_rate: float = 0.0  # of that residual
    encoder: bool = False
    unet: bool = False
    # Whether the encoder predicts the word anew for every draw, and the gradient follows φ_unet. That costs a quarter of a step,
    # and of offsets that learn beside an encoder that does not, the likeness is the same without (docs/benchmarks.md).
    fresh_word: bool = True
    # How many of them a number of the factors' rows, and of their columns, has in a concept's file; float16 where not given. What
    # they cost and keep is in docs/results.md.
    bits: tuple[int, int] | None = None


SCOPES: dict[str, Scope] = {
    "compact": Scope(rank=1, learning_rate=0.05, residual=True, word_rate=0.08, fresh_word=False, bits=(4, 5)),
    "head": Scope(rank=3, learning_rate=0.05, encoder=True),
    "full": Scope(rank=3, learning_rate=0.02, encoder=True, unet=True),
}


def find_scope(name: str) -> Scope:
    """The row of that name.

    Errors: `UserError` for another name.
    """
    if name not in SCOPES:
        raise UserError(f"{name!r} is unknown; choose one of {', '.join(SCOPES)}.", "scope")
    return SCOPES[name]
