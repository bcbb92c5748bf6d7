"""Captions as a careless web would write them: class, context and style, and some attributes in coarse words.

No caption ever names an identity. Two ways of naming attributes teach two things:

* *spelled out*: "a photo of a red one-eyed creature in the snow", a few adjectives before the noun;
* *compound nouns*: one word that carries several attributes, as names and compounds of a large vocabulary do; the
  embedding of the compound is that of the noun plus the weighted sum of its parts. Parts that shade into each other
  (red into orange, pale into plain) are weighed. A single word embedding learns to carry a description this way, which
  text encoders trained on billions of captions learn from the many rich single words of natural language.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from e4t_jax.creatures.world.attributes import (
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
from e4t_jax.templates import PLAIN_ENGLISH

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CAPTION_LENGTH = 32
PARTS = 14  # room for the parts of a compound
EYE_WORDS = ("one", "two", "three")
_EAR_PHRASES = ("earless", "bear-eared", "cat-eared", "bunny-eared", "horned", "antennaed")
_EAR_WORDS = ("earless", "bear", "cat", "bunny", "horned", "antennaed")
_HAT_WORDS = ("bareheaded", "hatted", "crowned", "scarfed", "bowtied")
_FLAGS = {"cheeks": "blushing", "feet": "footed", "tail": "tailed"}
_MOST_ADJECTIVES = 5
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


# Which attribute each of a description's parts tells of: the hues of body and trim are two words each.
_ATTRIBUTE_OF = np.array([0, 0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9, 10])
# Adjectives (columns of a description) that a picture of each class shows: hue and shade, and of a fish its shape, its back fin
# (in the words for ears), its trim and pattern, and its tail.
_SHOWN = {"creature": range(11), "house": (0, 1), "fish": (0, 1, 2, 4, 5, 10), "tree": (0, 1)}
assert len(_ATTRIBUTE_OF) == PARTS


class Description(NamedTuple):
    """Identities in words: an adjective for each attribute ("" where there is nothing to say), and the parts of a compound."""

    adjectives: np.ndarray  # str [n, attributes]
    parts: np.ndarray  # str [n, PARTS]
    weights: np.ndarray  # float32 [n, PARTS]


def describe(identities: Record) -> Description:
    """The attributes of identities in words; parts that shade into each other are weighed by their nearness."""

    def pick(words: Sequence[str], name: str) -> np.ndarray:
        return np.array(words)[identities[name].astype(int)]

    def blend(words: Sequence[str], hue: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        position = hue * len(words)
        low = np.floor(position).astype(int)
        ring = np.array(words)
        return [(ring[low % len(words)], 1 - (position - low)), (ring[(low + 1) % len(words)], position - low)]

    lightness = identities["lightness"]
    body, trim = (np.array(words)[hue_word(identities[hue])] for words, hue in ((BODY_HUES, "body_hue"), (TRIM_HUES, "trim_hue")))
    shade = np.where(lightness > 0, "pale", "dark")
    pattern, eyes, shape, mouth, hat = (
        pick(words, name)
        for words, name in ((PATTERNS, "pattern"), (EYE_WORDS, "eyes"), (SHAPES, "shape"), (MOUTHS, "mouth"), (_HAT_WORDS, "hat"))
    )
    flags = [np.where(identities[name] == 1, word, "") for name, word in _FLAGS.items()]
    trimming = np.where(pattern == "plain", "trimmed", pattern)
    adjectives = [body, np.where(np.abs(lightness) > 0.4, shade, ""), shape, np.char.add(eyes, "-eyed"), pick(_EAR_PHRASES, "ears")]
    adjectives += [np.char.add(np.char.add(trim, "-"), trimming), mouth, hat, *flags]
    whole = np.ones(len(lightness))
    parts = [*blend(BODY_HUES, identities["body_hue"]), (shade, np.abs(lightness)), (shape, whole), (eyes, whole)]
    parts += [(pick(_EAR_WORDS, "ears"), whole), *blend(TRIM_HUES, identities["trim_hue"]), (pattern, whole), (mouth, whole)]
    parts += [(hat, whole), *((np.full(len(lightness), word), identities[name]) for name, word in _FLAGS.items())]
    words, weights = (np.stack(column, axis=1) for column in zip(*parts, strict=True))
    return Description(np.stack(adjectives, axis=1), words, weights.astype(np.float32))


def sentence(style: int, kind: str, context: int, adjectives: list[str], *, named: bool = False) -> str:
    """ "a photo of a red one-eyed creature in the snow"; a compound that is used as a name goes without the article."""
    words = " ".join([*adjectives, kind])
    article = "an " if words[0] in "aeo" and not words.startswith("one") else "a "
    return f"{list(STYLES.values())[style]} of {'' if named else article}{words} {list(CONTEXTS.values())[context]}"


def write_captions(tokenizer: CLIPTokenizer, identities: Record, scenes: Record, seed: int, *, compounds=0.5) -> Captions:
    """One random caption a picture; a share `compounds` of them names attributes in a compound noun, the rest spells some out."""
    generator = np.random.default_rng([seed, 7])
    count = len(scenes["style"])
    described = describe(identities)
    attributes = described.adjectives.shape[1]
    shown = np.array([np.isin(np.arange(attributes), _SHOWN[kind]) for kind in CLASSES])
    spoken = shown[scenes["class"].astype(int)]
    compound = generator.uniform(size=count) < compounds
    named = compound & (generator.uniform(size=count) < 0.7)
    whole = generator.uniform(size=count) < 0.7
    chosen = spoken & compound[:, None] & (whole[:, None] | (generator.uniform(size=(count, attributes)) < 0.5))
    share = generator.choice([0.0, 0.3, 0.7], count)
    said = spoken & ~compound[:, None] & (generator.uniform(size=(count, attributes)) < share[:, None])
    said &= described.adjectives != ""
    said &= np.cumsum(said, axis=1) <= _MOST_ADJECTIVES
    said[:, 0] |= ~compound & (share > 0) & (generator.uniform(size=count) < 0.5)

    token = {word: tokenizer.convert_tokens_to_ids(word + "</w>") for word in vocabulary()}

    @cache
    def read_word(word: str) -> list[int]:
        return tokenizer(word, add_special_tokens=False).input_ids

    # Between spaces the tokenizer reads every word by itself, so each has to be read once only.
    def read(text: str) -> list[int]:
        return [piece for word in text.split() for piece in read_word(word)]

    ids = np.full((count, CAPTION_LENGTH), tokenizer.pad_token_id, np.int32)
    noun = np.zeros(count, np.int32)
    for row in range(count):
        kind = CLASSES[int(scenes["class"][row])]
        adjectives = described.adjectives[row, said[row]].tolist()
        text = sentence(int(scenes["style"][row]), kind, int(scenes["context"][row]), adjectives, named=bool(named[row]))
        line = [tokenizer.bos_token_id, *read(text), tokenizer.eos_token_id]
        ids[row, : len(line)], noun[row] = line, line.index(token[kind])
    words, which = np.unique(described.parts, return_inverse=True)
    parts = np.array([token[word] for word in words.tolist()], np.int32)[which.reshape(described.parts.shape)]
    weights = described.weights * chosen[:, _ATTRIBUTE_OF]
    return Captions(ids, noun, np.where(weights > 0, parts, 0), weights)
