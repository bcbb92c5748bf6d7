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
    # By way of a folder: what the class is built from differs between transformers 4 and 5, what it reads does not.
    with tempfile.TemporaryDirectory() as folder:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
        for name, content in {
            "vocab.json": json.dumps(words),
            "merges.txt": "\n".join(lines) + "\n",
            "tokenizer_config.json": json.dumps(settings),
        }.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
