"""The world's tokenizer, in CLIPTokenizer's own format: byte-pair merges that keep every word of the captions whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from e4t_jax.world.captions import CAPTION_LENGTH, vocabulary

_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(length: int = CAPTION_LENGTH, vocabulary_size: int | None = None) -> CLIPTokenizer:
    """Learns the merges from the world's vocabulary until every word is one token; any other text falls into smaller pieces.

    With a `vocabulary_size`, words that nothing is spelled with fill it up to that size: a stand-in for CLIP's own.
    """
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"<|unused{index}|>" for index in range(len(tokens), (vocabulary_size or 0) - 2)]
    words = {token: index for index, token in enumerate([*tokens, _START, _END])}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary_file.write_text(json.dumps(words), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary_file), str(merges_file), model_max_length=length)
