"""The world's tokenizer: every word of its captions is one token."""

from __future__ import annotations

from transformers import CLIPTokenizer

from e4t_jax.bases.tokenizers import tokenizer_of_words
from e4t_jax.creatures.captions import CAPTION_LENGTH, vocabulary


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer of the world's own words, for prompts as long as its longest caption."""
    return tokenizer_of_words(vocabulary(), CAPTION_LENGTH)
