"""Captions as a careless web would write them: class, context and style, and some attributes in coarse words.

No caption ever names an identity. Two ways of naming attributes teach two things:

* *spelled out*: "a photo of a red one-eyed creature in the snow", a few adjectives before the noun;
* *compound nouns*: one word that carries several attributes, as names and compounds of a large vocabulary do; the
  embedding of the compound is that of the noun plus the weighted sum of its parts. Parts that shade into each other
  (red into orange, pale into plain) are weighed. A single word embedding learns to carry a description this way, which
  text encoders trained on billions of captions learn from the many rich single words of natural language.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from transformers import CLIPTokenizer

from e4t_jax.creatures.attributes import (
    BODY_HUES,
    CLASSES,
    CONTEXTS,
    EARS,
    HATS,
    MOUTHS,
    PATTERNS,
    SHAPES,
    STYLES,
    TRIM_HUES,
    Record,
    hue_word,
)
from e4t_jax.prompts import PLAIN_ENGLISH

CAPTION_LENGTH = 32
PARTS = 14  # room for the parts of a compound
EYE_WORDS = ("one", "two", "three")
_EAR_PHRASES = ("earless", "bear-eared", "cat-eared", "bunny-eared", "horned", "antennaed")
_EAR_WORDS = ("earless", "bear", "cat", "bunny", "horned", "antennaed")
_HAT_WORDS = ("bareheaded", "hatted", "crowned", "scarfed", "bowtied")
assert len(_EAR_WORDS) == len(EARS) and len(_HAT_WORDS) == len(HATS)


class Captions(NamedTuple):
    """Tokenised captions with the parts of their compound nouns (part weight 0: none)."""

    ids: np.ndarray  # int32 [n, CAPTION_LENGTH]
    noun: np.ndarray  # int32 [n], position of the noun
    parts: np.ndarray  # int32 [n, PARTS], token ids
    weights: np.ndarray  # float32 [n, PARTS]


def vocabulary() -> list[str]:
    """Every word that the tokenizer keeps whole."""
    phrases = [*CONTEXTS.values(), *STYLES.values(), *CLASSES, *BODY_HUES, *TRIM_HUES, *SHAPES, *EYE_WORDS, *_EAR_PHRASES]
    phrases += [*_EAR_WORDS, *MOUTHS, *PATTERNS, *_HAT_WORDS, "pale dark eyed eared trimmed blushing footed tailed"]
    phrases += [PLAIN_ENGLISH]  # words beyond the captions' own, so that common prompts stay short; they mean nothing here
    return sorted({word for phrase in phrases for word in phrase.replace("-", " ").split()})


def _blend(words: tuple[str, ...], hue: float) -> dict[str, float]:
    position = hue * len(words)
    low = int(np.floor(position))
    share = position - low
    return {words[low % len(words)]: 1 - share, words[(low + 1) % len(words)]: share}


def describe(identity: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The attributes of one identity, each as (adjective, weighted words of a compound)."""
    body, trim = BODY_HUES[hue_word(identity["body_hue"])], TRIM_HUES[hue_word(identity["trim_hue"])]
    lightness = identity["lightness"]
    shade = "pale" if lightness > 0 else "dark"
    pattern, ears = PATTERNS[int(identity["pattern"])], int(identity["ears"])
    eyes, mouth = EYE_WORDS[int(identity["eyes"])], MOUTHS[int(identity["mouth"])]
    shape, hat = SHAPES[int(identity["shape"])], _HAT_WORDS[int(identity["hat"])]
    trimmed = f"{trim}-trimmed" if pattern == "plain" else f"{trim}-{pattern}"
    attributes = [
        (body, _blend(BODY_HUES, float(identity["body_hue"]))),
        (shade if abs(lightness) > 0.4 else "", {shade: abs(float(lightness))}),
        (shape, {shape: 1.0}),
        (f"{eyes}-eyed", {eyes: 1.0}),
        (_EAR_PHRASES[ears], {_EAR_WORDS[ears]: 1.0}),
        (trimmed, {**_blend(TRIM_HUES, float(identity["trim_hue"])), pattern: 1.0}),
        (mouth, {mouth: 1.0}),
        (hat, {hat: 1.0}),
    ]
    for name, word in (("cheeks", "blushing"), ("feet", "footed"), ("tail", "tailed")):
        if identity[name] == 1:
            attributes.append((word, {word: 1.0}))
    return attributes


def _spoken(kind: str, attributes: list[tuple[str, dict[str, float]]]) -> list[tuple[str, dict[str, float]]]:
    if kind == "creature":
        return attributes
    return [attribute for attribute in attributes if attribute[0] in (*BODY_HUES, "pale", "dark")]


def sentence(style: int, kind: str, context: int, adjectives: list[str], *, named: bool = False) -> str:
    """ "a photo of a red one-eyed creature in the snow"; a compound that is used as a name goes without the article."""
    words = " ".join([*adjectives, kind])
    article = "an " if words[0] in "aeo" and not words.startswith("one") else "a "
    return f"{list(STYLES.values())[style]} of {'' if named else article}{words} {list(CONTEXTS.values())[context]}"


def write_captions(tokenizer: CLIPTokenizer, identities: Record, scenes: Record, seed: int, *, compounds=0.5) -> Captions:
    """One random caption a picture; a share `compounds` of them names attributes in a compound noun, the rest spells some out."""
    generator = np.random.default_rng([seed, 7])
    count = len(scenes["style"])
    written = Captions(
        np.zeros((count, CAPTION_LENGTH), np.int32),
        np.zeros(count, np.int32),
        np.zeros((count, PARTS), np.int32),
        np.zeros((count, PARTS), np.float32),
    )
    token = {word: tokenizer.convert_tokens_to_ids(word + "</w>") for word in vocabulary()}
    sentences = []
    for row in range(count):
        kind = CLASSES[int(scenes["class"][row])]
        attributes = _spoken(kind, describe({name: value[row] for name, value in identities.items()}))
        adjectives: list[str] = []
        named = False
        if generator.uniform() < compounds:
            named = generator.uniform() < 0.7
            kept = generator.uniform() < 0.7
            chosen = [one for one in attributes if kept or generator.uniform() < 0.5]
            words = [pair for _, parts in chosen for pair in parts.items()]
            assert len(words) <= PARTS
            written.parts[row, : len(words)] = [token[word] for word, _ in words]
            written.weights[row, : len(words)] = [weight for _, weight in words]
        else:
            share = generator.choice([0.0, 0.3, 0.7])
            adjectives = [one for one, _ in attributes if one and generator.uniform() < share][:5]
            if share and attributes[0][0] not in adjectives and generator.uniform() < 0.5:
                adjectives.insert(0, attributes[0][0])
        sentences.append(sentence(int(scenes["style"][row]), kind, int(scenes["context"][row]), adjectives, named=named))
        kinds = token[kind]
        ids = tokenizer(sentences[-1], padding="max_length", max_length=CAPTION_LENGTH, truncation=True).input_ids
        written.ids[row], written.noun[row] = ids, ids.index(kinds)
    return written
