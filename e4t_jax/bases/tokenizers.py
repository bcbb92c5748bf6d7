"""CLIP tokenizers: one made from a list of words, for models that are not downloaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"


def tokenizer_of_words(words: Iterable[str], length: int, size: int | None = None) -> CLIPTokenizer:
    """Learns byte-pair merges until every word is one token; any other text falls into smaller pieces.

    `length` is the longest prompt in tokens. With a `size`, words that nothing is spelled with fill the vocabulary up to it: a
    stand-in for CLIP's own.
    """
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=20_000, min_frequency=1, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    model.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"<|unused{index}|>" for index in range(len(tokens), (size or 0) - 2)]
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    # By way of a folder: what the class is built from differs between transformers 4 and 5, what it reads does not.
    with tempfile.TemporaryDirectory() as folder:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
        for name, content in {
            "vocab.json": json.dumps(vocabulary),
            "merges.txt": "\n".join(lines) + "\n",
            "tokenizer_config.json": json.dumps(settings),
        }.items():
            Path(folder, name).write_text(content, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
