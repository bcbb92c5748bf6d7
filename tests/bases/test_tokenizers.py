"""Tokenizers of bases: read in every form, and what is wrong with one is said in one line."""

import json

import numpy as np
import pytest
from base_folder import assert_one_line, change, without_checksums

from e4t_jax import bases
from e4t_jax.bases.tokenizers import tokenizer_of_words
from e4t_jax.templates import known_words
from e4t_jax.words import tokenize


def test_the_same_words_make_the_same_tokenizer():
    """Ties between equally frequent pairs are broken the same way every time."""
    first, *others = (tokenizer_of_words(known_words(), 77).get_vocab() for _ in range(5))
    assert all(other == first for other in others)


@pytest.mark.compiles
def test_a_tokenizer_without_a_length_has_the_text_encoders(folder):
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=...)
    assert bases.load_base(str(folder))[0].tokenizer.model_max_length == 32
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=1000)
    assert bases.load_base(str(folder))[0].tokenizer.model_max_length == 32
    change(folder / "tokenizer" / "tokenizer_config.json", model_max_length=20)
    assert bases.load_base(str(folder))[0].tokenizer.model_max_length == 20


@pytest.mark.compiles
def test_a_tokenizer_in_one_file_is_read_and_written_again(folder, tmp_path):
    """tokenizer.json alone: the same ids, here and in PyTorch's classes after a round trip."""
    transformers = pytest.importorskip("transformers")
    text = "a Photo of a red creature, in the snow's 12"
    base, params = bases.load_base(str(folder))
    ids = base.tokenizer(text).input_ids
    whole = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    whole.save_pretrained(folder / "tokenizer")
    without_checksums(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=name == "special_tokens_map.json")  # which newer libraries leave out
    again, _ = bases.load_base(str(folder))
    assert again.tokenizer(text).input_ids == ids
    prompts = ["a photo of *s in the snow", "*S"]
    for one, other in zip(*(tokenize(one.tokenizer, prompts, domain_token="creature") for one in (again, base)), strict=True):
        np.testing.assert_array_equal(one, other)
    bases.save_folder(tmp_path / "again", again, params)
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path / "again" / "tokenizer")(text).input_ids == ids
    whole = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    merges = whole["model"]["merges"]
    cut = {**whole, "model": {**whole["model"], "merges": merges[:-1]}}
    for content, said in (("{", "is damaged"), ("{}", "is damaged"), (json.dumps(cut), f"it makes no '{''.join(merges[-1])}'")):
        (folder / "tokenizer" / "tokenizer.json").write_text(content)
        assert_one_line(folder, f"tokenizer/tokenizer.json .*{said}")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("merges.txt", None, "merges.txt does not exist"),
        ("vocab.json", None, "vocab.json does not exist"),
        ("merges.txt", b"\xff\xfe\x00", "merges.txt is damaged"),
        ("merges.txt", b"", "merges.txt does not fit"),
        ("merges.txt", b"#version: 0.2\nc r\ncr", "merges.txt is damaged .*no pair of pieces"),
        ("vocab.json", b'{"a": 1, ', "vocab.json is damaged"),
        ("vocab.json", b"[1]", "vocab.json holds no object"),
        ("vocab.json", b'{"cr": 0, "a": 1}', "merges.txt does not fit the words of vocab.json"),
        ("vocab.json", b'{"cr": 0, "a": 2}', "ids of its words do not count up from 0"),
        ("vocab.json", b'{"cr": 0, "a": 0}', "ids of its words do not count up from 0"),
        ("vocab.json", b'{"cr": "x"}', "ids of its words do not count up from 0"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is damaged"),
        ("special_tokens_map.json", b"\x00", "special_tokens_map.json is damaged"),
        ("added_tokens.json", b"nonsense", "added_tokens.json is damaged"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_one_line(folder, name, content, said):
    without_checksums(folder)
    path = folder / "tokenizer" / name
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # newer libraries write it too, and it stands for both
    path.write_bytes(content) if content is not None else path.unlink()
    assert_one_line(folder, said)


@pytest.mark.parametrize("kept", [1, 2, 0.5, -1])
def test_merges_cut_at_the_end_of_a_line_are_noticed(folder, kept):
    """Every line that is left is a good one: what tells is the words of vocab.json that none of them makes any more."""
    without_checksums(folder)
    path = folder / "tokenizer" / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: int(kept * len(lines)) if kept == 0.5 else kept]), encoding="utf-8")
    assert_one_line(
        folder, r"merges.txt does not fit the words of vocab.json: it makes no '.+', which vocab.json holds; .*copy both again"
    )


@pytest.mark.parametrize("word", ["creature</w>", "a"])
def test_a_word_that_the_vocabulary_lost_is_noticed(folder, word):
    """Its ids still count up: what tells is the merges that make the word or are made of it."""
    without_checksums(folder)
    path = folder / "tokenizer" / "vocab.json"
    left = [one for one in json.loads(path.read_text(encoding="utf-8")) if one != word]
    path.write_text(json.dumps({one: index for index, one in enumerate(left)}), encoding="utf-8")
    assert_one_line(
        folder, rf"merges.txt does not fit the words of vocab.json: it asks for '{word}', which vocab.json does not hold"
    )


def test_a_tokenizer_of_another_text_encoder_is_refused(folder):
    """An id beyond the table of words would be read as its last word, in silence."""
    change(folder / "text_encoder" / "config.json", vocab_size=907)
    assert_one_line(folder, "tokenizer of 908 words, and the text encoder beside it knows 907")
