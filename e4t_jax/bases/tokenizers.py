"""CLIP tokenizers: read from a folder, written to one, or made from a list of words for models that are not downloaded."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e4t_jax.bases.formats import read_json
from e4t_jax.errors import UserError, reason_of, shortened

if TYPE_CHECKING:  # they import PyTorch where there is one, which takes seconds; so only what reads a tokenizer does
    from transformers import CLIPTokenizer, PreTrainedTokenizerBase

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_SPECIAL = re.compile(r"<[^<>]+>")  # what no merge makes


def tokenizer_of_words(words: Iterable[str], length: int, size: int | None = None) -> CLIPTokenizer:
    """Learns byte-pair merges until every word is one token; any other text falls into smaller pieces.

    `length` is the longest prompt in tokens. With a `size`, words that nothing is spelled with fill the vocabulary up to it: a
    stand-in for CLIP's own.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    model = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + _WORD_END for letter in letters]
    # Named beforehand, they have fixed numbers; else they are numbered as a hash table goes, and ties fall another way each time.
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        special_tokens=ends,
        initial_alphabet=letters,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    model.train_from_iterator(words, trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys([*letters, *ends, *("".join(merge) for merge in merges)]))
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


def load_tokenizer(folder: Path, length: int, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a base: from vocab.json and merges.txt, or from tokenizer.json, which is all that newer libraries write.

    `length` and `vocabulary` are the text encoder's: prompts are never longer than it reads, words never more than it knows.

    Errors: `UserError` when a file is missing or damaged, and for a tokenizer of another text encoder.
    """
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    vocab, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            read_json(folder / name)
    if whole.exists():  # newer libraries read it even where the others are
        model = read_json(whole).get("model")
        model = model if isinstance(model, dict) else {}
        _check_words(whole, model.get("vocab"), whole, _pairs(model.get("merges")))
    kind = CLIPTokenizerFast
    if not whole.exists() or (vocab.exists() and merges.exists()):
        _check_words(vocab, read_json(vocab), merges, _read_merges(merges))
        kind = CLIPTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        ids = tokenizer.get_vocab().values()
        special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
        tokenizer("a word").input_ids  # noqa: B018, what is damaged may show only in use
    except Exception as error:  # whatever the damage makes the library raise
        reason = reason_of(error)
        raise UserError(f"{folder} holds no tokenizer that can be read ({reason}); copy it again.") from None
    if None in special or len(set(special[:2])) < 2:
        raise UserError(f"{folder} holds a tokenizer without {_START} and {_END} of its own; copy it again.")
    if max(ids) >= vocabulary:
        raise UserError(
            f"{folder} holds a tokenizer of {max(ids) + 1} words, and the text encoder beside it knows {vocabulary}; "
            "give both of one model."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)
    return tokenizer


def _read_merges(path: Path) -> list[list[str]]:
    """The pairs of pieces that the lines of merges.txt join, heading apart."""
    try:
        lines = path.read_text(encoding="utf-8").strip().split("\n")[1:]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the base model is incomplete, copy it again.") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged; copy it again.") from None
    return [line.split() for line in lines]


def _pairs(merges: Any) -> list[list[str]]:
    """The same of tokenizer.json, where a pair is a list, or a text in older files."""
    return [pair.split() if isinstance(pair, str) else pair for pair in (merges if isinstance(merges, list) else [])]


def _check_words(vocab: Path, vocabulary: Any, merges: Path, pairs: list[list[str]]) -> None:
    """Merges and vocabulary are of one tokenizer, and whole: either cut off, at the end of a line too, differs from the other.

    Every pair joins two words to a third, every word longer than a letter is joined so, and ids count up from 0.

    Errors: `UserError` where they do not; it names the files.
    """
    if not isinstance(vocabulary, dict) or sorted(map(str, vocabulary.values())) != sorted(map(str, range(len(vocabulary)))):
        raise UserError(f"{vocab} is damaged (the ids of its words do not count up from 0); copy it again.")
    words = {word for word in vocabulary if len(word.removesuffix(_WORD_END)) > 1 and not _SPECIAL.fullmatch(word)}
    # CLIP's file goes on after what its vocabulary was made of, as the reader knows.
    pairs = pairs[: len(words)] if len(pairs) > len(vocabulary) else pairs
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) for piece in pair):
            raise UserError(f"{merges} is damaged ({shortened(pair)} is no pair of pieces of a word); copy it again.")
    joined = {"".join(pair) for pair in pairs}
    for lost, what in (
        (joined.union(*pairs) - set(vocabulary), f"it asks for {{}}, which {vocab.name} does not hold"),
        (words - joined, f"it makes no {{}}, which {vocab.name} holds"),
    ):
        if lost:
            what = what.format(shortened(min(lost)))
            raise UserError(
                f"{merges} does not fit the words of {vocab.name}: {what}; one was cut off or is another's, copy both again."
            )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer for every version of its class: vocab.json and merges.txt too where it has only tokenizer.json.

    Errors: `UserError` when the files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        whole = folder / "tokenizer.json"
        if whole.exists() and not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
            model = json.loads(whole.read_text(encoding="utf-8"))["model"]
            pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
    except UserError:
        raise
    except Exception as error:  # the part of it that is not Python raises no OSError when the disk is full
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"Cannot write {folder}: {reason}; choose another folder or free some space.") from None
