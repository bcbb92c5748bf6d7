"""What can be drawn: the attributes of an identity, the contexts, styles and poses, and their sampling.

An *identity* is a point in a space of seventeen attributes, discrete and continuous; a *scene* is everything else in a
picture: context, style and pose. Both are flat records of float32 numbers, so that a batch is a record of arrays and
the renderer vectorises over it. Words for the attributes live here too, beside the values that they name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Record = dict[str, np.ndarray]

CLASSES = ("creature", "house", "fish", "tree")
CONTEXTS = {
    "snow": "in the snow",
    "beach": "on the beach",
    "forest": "in the forest",
    "city": "in the city",
    "desert": "in the desert",
    "space": "in space",
    "sea": "under water",
    "meadow": "in a meadow",
    "room": "in a room",
    "sunset": "at sunset",
}
STYLES = {
    "photo": "a photo",
    "cartoon": "a cartoon",
    "watercolor": "a watercolor",
    "sketch": "a pencil sketch",
}
# Two vocabularies for the same eight hues, so that a caption can tell body from trim without grammar.
BODY_HUES = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
TRIM_HUES = ("crimson", "amber", "golden", "emerald", "turquoise", "azure", "violet", "rosy")
SHAPES = ("round", "boxy", "tall", "wide", "pear")
EARS = ("earless", "bear", "cat", "bunny", "horned", "antennae")
EYES = ("cyclops", "twin", "triple")
MOUTHS = ("smiling", "shouting", "fanged", "beaked")
PATTERNS = ("plain", "spotted", "striped", "bellied", "masked")
HATS = ("bareheaded", "hatted", "crowned", "scarfed", "bowed")

# attribute -> number of values; the order fixes the stream of random numbers and so every picture of the world
_DISCRETE = {
    "shape": len(SHAPES),
    "ears": len(EARS),
    "eyes": len(EYES),
    "mouth": len(MOUTHS),
    "pattern": len(PATTERNS),
    "hat": len(HATS),
    "cheeks": 2,
    "feet": 2,
    "tail": 2,
}
# attribute -> (low, high)
_CONTINUOUS = {
    "lightness": (-1.0, 1.0),
    "aspect": (-1.0, 1.0),
    "ear_size": (0.8, 1.25),
    "eye_size": (0.85, 1.25),
    "pattern_phase": (0.0, 1.0),
    "iris": (0.0, 1.0),
}
_SPLITS = {"train": 1, "validation": 2, "test": 3}
# Hues cluster around their words and leave gaps between: every hue has a name, and still no two reds are the same.
_HUE_SPREAD = 0.32


def _hue(generator: np.random.Generator, count: int) -> np.ndarray:
    words = generator.integers(0, len(BODY_HUES), count)
    return ((words + generator.uniform(-_HUE_SPREAD, _HUE_SPREAD, count)) / len(BODY_HUES)) % 1.0


def sample_identities(seed: int, count: int, *, split: str = "train") -> Record:
    """Draws `count` identities; train, validation and test never share a stream, so any seed is held out from the others."""
    generator = np.random.default_rng([_SPLITS[split], int(seed) & 0xFFFFFFFFFFFF, 0])
    record = {"body_hue": _hue(generator, count), "trim_hue": _hue(generator, count)}
    for name, values in _DISCRETE.items():
        record[name] = generator.integers(0, values, count)
    for name, (low, high) in _CONTINUOUS.items():
        record[name] = generator.uniform(low, high, count)
    record["trim_hue"] = _visible_trim(record)
    return {name: value.astype(np.float32) for name, value in record.items()}


def sample_relatives(seed: int, count: int, *, shared: float = 0.5, split: str = "train") -> Record:
    """`count` identities that agree in a random share of their attributes: each is common to all with probability `shared`."""
    record = sample_identities(seed, count, split=split)
    generator = np.random.default_rng([_SPLITS[split], int(seed) & 0xFFFFFFFFFFFF, 2])
    common = {name: generator.uniform() < shared for name in record}
    record = {name: np.full_like(value, value[0]) if common[name] else value for name, value in record.items()}
    return {**record, "trim_hue": _visible_trim(record).astype(np.float32)}


def _visible_trim(record: Record) -> np.ndarray:
    """The trim's hue, moved to the far side of the circle where it is the body's own and would hide the pattern."""
    distance = np.abs((record["trim_hue"] - record["body_hue"] + 0.5) % 1.0 - 0.5)
    return np.where(distance < 0.13, (record["trim_hue"] + 0.5) % 1.0, record["trim_hue"])


def sample_scenes(seed: int, count: int, *, split: str = "train", **fixed: float | np.ndarray) -> Record:
    """Draws `count` scenes (class creature unless `fixed` says otherwise); a keyword fixes an attribute by its index or value."""
    generator = np.random.default_rng([_SPLITS[split], int(seed) & 0xFFFFFFFFFFFF, 1])
    record = {
        "class": np.zeros(count),
        "context": generator.integers(0, len(CONTEXTS), count),
        "style": generator.integers(0, len(STYLES), count),
        "x": generator.uniform(-0.12, 0.12, count),
        "y": generator.uniform(0.0, 0.1, count),
        "scale": generator.uniform(0.64, 0.76, count),
        "tilt": generator.uniform(-0.16, 0.16, count),
        "mood": generator.uniform(0.4, 1.0, count),
    }
    for index in range(6):
        record[f"scenery_{index}"] = generator.uniform(0, 1, count)
    for name, value in fixed.items():
        if name not in record:
            raise KeyError(f"unknown scene attribute {name!r}")
        record[name] = np.broadcast_to(np.asarray(value), (count,))
    return {name: np.asarray(value, np.float32) for name, value in record.items()}


def of_class(kind: str) -> dict[str, Any]:
    """What fixes the class of scenes, for `sample_scenes`: a keyword that Python keeps for itself."""
    return {"class": CLASSES.index(kind)}


def take(record: Record, index: np.ndarray | slice | int) -> Record:
    """The rows `index` of a record."""
    return {name: value[index] for name, value in record.items()}


def hue_word(hue: np.ndarray | np.floating | float) -> np.ndarray | np.integer:
    """Index of the hue's word: the nearest of the eight, on the circle."""
    return np.round(np.asarray(hue) * len(BODY_HUES)).astype(int) % len(BODY_HUES)
