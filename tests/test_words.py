"""The placeholder may stand anywhere, and its word, and nothing else, is replaced."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from e4t_jax import templates, words
from e4t_jax.errors import UserError

LENGTH = 16
WORDS = ["a", "photo", "of", "creature", "in", "the", "snow", "hat", "face", "'s", ",", ".", "s", "*", "sun", "red"]


@pytest.fixture(scope="module", params=["CLIPTokenizer", "CLIPTokenizerFast"])
def tokenizer(request, tmp_path_factory):
    """A CLIP tokenizer whose merges spell out WORDS letter by letter; it pads with "!" as SD 2.x does."""
    transformers = pytest.importorskip("transformers")
    letters = sorted({letter for word in WORDS for letter in word} | set("bdgjklmqvxyz!"))
    vocabulary = ["!", *(x for x in letters if x != "!"), *(f"{x}</w>" for x in letters)]
    merges = []
    for word in WORDS:
        spelled = [*word[:-1], f"{word[-1]}</w>"]
        while len(spelled) > 1:
            pair = f"{spelled[0]} {spelled[1]}"
            spelled[:2] = [spelled[0] + spelled[1]]
            merges += [pair] if pair not in merges else []
            vocabulary += [spelled[0]] if spelled[0] not in vocabulary else []
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return getattr(transformers, request.param)(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="!", model_max_length=LENGTH
    )


@pytest.mark.parametrize(
    ("prompt", "spoken", "places"),
    [
        ("a photo of *s", "a photo of creature", [4]),
        ("a photo of *s, in the snow", "a photo of creature, in the snow", [4]),
        ("*s's hat", "creature's hat", [1]),
        ("*s", "creature", [1]),
        ("the face of *s.", "the face of creature.", [4]),
        ("*s in the hat of *s", "creature in the hat of creature", [1, 6]),
        ("*s*s", "creature creature", [1, 2]),
        ("a creature, *S in the sun", "a creature, creature in the sun", [4]),
        ("the *sun of *s", "the *sun of creature", [5]),
    ],
)
def test_a_placeholder_anywhere_reads_as_the_domain_word_and_is_marked(tokenizer, prompt, spoken, places):
    tokens = words.tokenize(tokenizer, [prompt], domain_token="creature")
    np.testing.assert_array_equal(tokens.ids, [tokenizer(spoken, padding="max_length").input_ids])
    np.testing.assert_array_equal(np.flatnonzero(tokens.placeholder[0]), places)
    assert tokens.ids.dtype == np.int32 and tokens.placeholder.dtype == bool


def test_an_empty_prompt_is_read_where_no_placeholder_is_required(tokenizer):
    tokens = words.tokenize(tokenizer, ["", "a hat"], domain_token="creature", require_placeholder=False)
    expected = tokenizer(["", "a hat"], padding="max_length").input_ids
    np.testing.assert_array_equal(tokens.ids, expected)
    assert not tokens.placeholder.any()


def test_another_placeholder_may_be_chosen(tokenizer):
    tokens = words.tokenize(tokenizer, ["a photo of <me>"], placeholder="<me>", domain_token="face")
    assert tokens.ids[0, 4] == words.domain_token_id(tokenizer, "face") and tokens.placeholder[0, 4]
    assert templates.templates("face", "<me>")[0] == "a photo of <me>"


def test_a_prompt_that_fits_exactly_is_kept_and_one_token_more_is_an_error(tokenizer):
    full = " ".join(["a"] * (LENGTH - 3)) + " *s"
    tokens = words.tokenize(tokenizer, [full], domain_token="creature")
    assert tokens.placeholder[0, LENGTH - 2] and tokens.ids[0, LENGTH - 1] == tokenizer.eos_token_id
    with pytest.raises(UserError, match=f"{LENGTH - 1} tokens, the limit is {LENGTH - 2}"):
        words.tokenize(tokenizer, [f"a {full}"], domain_token="creature")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a photo of a hat", {}, "lacks the placeholder"),
        ("the *sun", {}, "lacks the placeholder"),
        ("a photo of *s", {"domain_token": "zebra"}, "not one token"),
        ("a photo of *s", {"domain_token": "red hat"}, "not one token"),
        ("a photo of *s", {"domain_token": ""}, "not one token"),
        ("a photo of hat", {"placeholder": "hat"}, "vocabulary already"),
        ("a photo of *s", {"placeholder": ""}, "must be one word"),
        ("a photo of my s", {"placeholder": "my s"}, "must be one word"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(tokenizer, prompt, options, message):
    with pytest.raises(UserError, match=message) as raised:
        words.tokenize(tokenizer, [prompt], **{"domain_token": "creature", **options})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("prompt", "piece"),
    [
        ("(*s:1.3) in the snow", "(*s:1.3)"),
        ("a photo of *s++, oil", "*s++"),
        ("a *s-- in fog", "*s--"),
        ("(red *s)1.2 in fog", "(red *s)1.2"),
        ("(red *s)+ in fog", "(red *s)+"),
        ("[a cat:*s:0.5]", "[a cat:*s:0.5]"),
        ("[red|blue] *s", "[red|blue]"),
        ("((*s)) in fog", "((*s))"),
        ("*s <lora:snow:0.8>", "<lora:snow:0.8>"),
        ("embedding:venus in fog", "embedding:venus"),
    ],
)
def test_weights_and_files_in_a_prompt_are_found(prompt, piece):
    assert words.other_syntax(["a photo of *s", prompt]) == piece


def test_plain_prompts_hold_no_weights():
    every = [sentence for kind in templates.TEMPLATES for sentence in templates.templates(kind)]
    plain = ["*s (oil on canvas)", "*s at (10:30)", "a *s -- in fog", "*s + a dog", "*s's house [detail]", "state-of-the-art *s"]
    assert words.other_syntax([*every, *plain]) is None


@pytest.mark.parametrize(
    ("token", "mend"),
    [
        ("fishes", "near it is fish."),
        ("Red hats", "near it is red."),
        ("portait", "near it is portrait."),
        ("zzzq", "choose a more common word."),
        ("", "choose a more common word."),
        ("猫", "choose a more common word."),
    ],
)
def test_a_word_of_several_tokens_is_told_the_near_ones(token, mend):
    """Of the drawn world's vocabulary; every word that is named is one token itself."""
    from e4t_jax.creatures.learning.tokenizer import build_tokenizer

    own = build_tokenizer()
    with pytest.raises(UserError, match=f"; {re.escape(mend)}") as raised:
        words.domain_token_id(own, token)
    named = raised.value.message.rpartition("; near it ")[2].removeprefix("are ").removeprefix("is ").rstrip(".")
    for word in named.split(", ") if "near it" in raised.value.message else []:
        assert words.domain_token_id(own, word) >= 0


def test_a_domain_word_outside_the_vocabulary_is_an_error_even_as_one_unknown_token(tokenizer):
    with pytest.raises(UserError, match="not one token"):
        words.domain_token_id(tokenizer, "猫")


def test_every_template_holds_its_placeholder_once_and_none_comes_twice():
    for kind in templates.TEMPLATES:
        sentences = templates.templates(kind)
        assert len(set(sentences)) == len(sentences) >= 5
        assert all(sentence.count("*s") == 1 for sentence in sentences)
    with pytest.raises(UserError, match="neutral, object, face, art"):
        templates.templates("vegetable")


def test_inject_replaces_the_marked_words_and_no_others():
    rng = np.random.default_rng(0)
    known = rng.standard_normal((2, 5, 3)).astype(np.float32)
    concept = rng.standard_normal((2, 3)).astype(np.float32)
    marks = np.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    expected = known.copy()
    expected[0, [1, 4]] = concept[0]
    np.testing.assert_array_equal(words.inject(jnp.asarray(known), jnp.asarray(marks), jnp.asarray(concept)), expected)
