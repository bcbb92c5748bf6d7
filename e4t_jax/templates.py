"""Captions by kind of domain: prompts for pictures that have none, and the scenes that a bare picture may show."""

import re
from typing import Any

import numpy as np
from jaxtyping import Float

from e4t_jax.errors import UserError
from e4t_jax.words import PLACEHOLDER

# A template must hold for every picture of its domain: a sentence that names a place, a season or a technique
# would teach the concept's word to deny it. "neutral" claims no medium, "creature" names those of its world.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "neutral": (
        "*s",
        "a picture of *s",
        "an image of *s",
        "a depiction of *s",
        "a view of *s",
        "this is *s",
        "this picture shows *s",
        "here we see *s",
        "a picture with *s in it",
        "one more picture of *s",
    ),
    "object": (
        "a photo of *s",
        "a photograph of *s",
        "a close-up of *s",
        "a snapshot of *s",
        "a clear photo of *s",
        "a blurry photo of *s",
        "a small photo of *s",
        "a cropped photo of *s",
        "a photo that shows *s",
        "a picture someone took of *s",
        "*s, photographed up close",
        "*s in a photo",
    ),
    "face": (
        "a photo of *s",
        "a portrait of *s",
        "a close-up portrait of *s",
        "a headshot of *s",
        "a photo of the face of *s",
        "a picture of *s facing the camera",
        "a candid photo of *s",
        "*s, head and shoulders",
        "*s in a portrait photo",
        "a cropped photo of *s's face",
    ),
    "art": (
        "a painting in the style of *s",
        "a work of art in the style of *s",
        "a picture in the style of *s",
        "an artwork in the manner of *s",
        "a composition in the style of *s",
        "a piece inspired by *s",
        "the art of *s",
        "a canvas in the style of *s",
        "a detail of an artwork in the style of *s",
        "*s as an art style",
    ),
    "creature": (
        "*s",
        "a photo of *s",
        "a cartoon of *s",
        "a watercolor of *s",
        "a pencil sketch of *s",
    ),
}


# What a picture may be and where: every medium with every place is a caption that `captioning` may find to fit.
# The first medium is the likeliest: places are told apart under it.
_MEDIA = ("a photo", "a painting", "a drawing", "a cartoon", "a watercolor", "a pencil sketch", "a 3d rendering")
_PLACES = (
    "",
    "on a white background",
    "on a dark background",
    "in a room",
    "in a kitchen",
    "on a table",
    "on a street",
    "in a city",
    "on grass",
    "in a meadow",
    "in a forest",
    "in the mountains",
    "in the desert",
    "in the snow",
    "on the beach",
    "by the sea",
    "under water",
    "in the sky",
    "in space",
    "at sunset",
    "at night",
)
SCENES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "neutral": (("a picture", *_MEDIA), _PLACES),
    "object": (_MEDIA, _PLACES),
    "face": (
        ("a photo", "a portrait photo", "a close-up photo", "a black and white photo", "a painting", "a drawing", "a 3d rendering"),
        ("", "outdoors", "on a street", "in a room", "on a stage", "in front of a wall", "on a dark background", "at night"),
    ),
    "art": (
        ("a painting in the style", "a drawing in the style", "a print in the style", "a watercolor in the style"),
        ("", *(f"showing {what}" for what in ("people", "a portrait", "a landscape", "a city", "the sea", "flowers", "shapes"))),
    ),
    "creature": (
        ("a photo", "a cartoon", "a watercolor", "a pencil sketch"),
        (
            "in the snow",
            "on the beach",
            "in the forest",
            "in the city",
            "in the desert",
            "in space",
            "under water",
            "in a meadow",
            "in a room",
            "at sunset",
        ),
    ),
}


_LEAST_WEIGHT = 0.005  # of a caption that is named


# What a demonstration draws a concept in: as it is, elsewhere, in other media.
SHOWCASE: dict[str, tuple[str, str, str, str]] = {
    "neutral": ("a picture of *s", "a photo of *s in the snow", "a watercolor of *s", "a pencil sketch of *s"),
    "object": ("a photo of *s", "a photo of *s on the beach", "a watercolor of *s", "a pencil sketch of *s"),
    "face": ("a photo of *s", "a photo of *s in the snow", "an oil painting of *s", "a pencil sketch of *s"),
    "art": (
        "a painting of a house in the style of *s",
        "a painting of a cat in the style of *s",
        "a portrait in the style of *s",
        "a painting of the sea in the style of *s",
    ),
    "creature": (
        "a photo of *s in the snow",
        "a cartoon of *s on the beach",
        "a watercolor of *s in the forest",
        "a pencil sketch of *s in space",
    ),
}
PLAIN_ENGLISH = (
    "the an my one nice good cute small little large beautiful close up closeup picture image rendering depiction drawing "
    "painting portrait view of on in at with and by from for to is it this that new old day night morning evening "
    "standing sitting smiling playing running sleeping flying living person face man woman dog animal thing object "
    "style art very happy sad big tiny wearing under over near beside between behind front two three sky sun moon star"
)
_DOMAIN_WORDS = "creature cat flower building car painting child baby bird horse house tree fish toy"


def templates(kind: str, placeholder: str = PLACEHOLDER) -> tuple[str, ...]:
    """The prompts of one kind of domain (a key of `TEMPLATES`), with `placeholder` in them.

    Errors: `UserError` for a kind that has no list.
    """
    if kind not in TEMPLATES:
        raise UserError(f"{kind!r} is unknown; choose one of {', '.join(TEMPLATES)}.", "template")
    return tuple(template.replace(PLACEHOLDER, placeholder) for template in TEMPLATES[kind])


def scene_captions(kind: str) -> list[list[str]]:
    """Every medium (outer) with every place (inner) of one kind of domain: "a photo of *s in the snow".

    Errors: `UserError` for a kind that has no list.
    """
    templates(kind)
    media, places = SCENES[kind]
    return [[f"{medium} of {PLACEHOLDER} {place}".strip() for place in places] for medium in media]


def heaviest_captions(kind: str, weights: Float[np.ndarray, "media places"], most: int = 8) -> list[dict[str, Any]]:
    """Those of `scene_captions(kind)` that weigh something, the heaviest first: `{"caption": text, "weight": number}`.

    Args:
        kind: A key of `TEMPLATES`.
        weights: One for each caption.
        most: How many are named at most.

    Errors: `UserError` for a kind that has no list.
    """
    captions = [caption for row in scene_captions(kind) for caption in row]
    pairs = sorted(zip(np.ravel(weights).tolist(), captions, strict=True), reverse=True)
    return [{"caption": caption, "weight": round(weight, 3)} for weight, caption in pairs[:most] if weight >= _LEAST_WEIGHT]


def known_words() -> list[str]:
    """Every word of this package's prompts, and some common ones: what a tokenizer that is made up should keep whole."""
    media_and_places = [phrase for media, places in SCENES.values() for phrase in (*media, *places)]
    phrases = [*(one for kind in TEMPLATES.values() for one in kind), *media_and_places, PLAIN_ENGLISH, _DOMAIN_WORDS]
    words = {word for phrase in phrases for word in re.findall(r"[a-z0-9]+", phrase.replace(PLACEHOLDER, ""))}
    return sorted(words)
