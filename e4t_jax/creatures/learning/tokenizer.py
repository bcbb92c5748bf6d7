"""The world's tokenizer: every word of its captions is one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e4t_jax.bases.tokenizers import tokenizer_of_words
from e4t_jax.creatures.world.captions import CAPTION_LENGTH, vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer of the world's own words, for prompts as long as its longest caption."""
    return tokenizer_of_words(vocabulary(), CAPTION_LENGTH)
