"""From prompts with a placeholder to token ids, and the concept's word embedding in the placeholder's stead.

A prompt such as "a photo of *s in the snow" becomes n token ids. At the placeholder stands the id of the
domain token ("creature"), and the concept's embedding e* takes the place of that token's word embedding
(E4T, arXiv 2302.12228, as textual inversion does, arXiv 2208.01618):

    words_j = e*                        where placeholder_j
    words_j = embedding(ids_j)          elsewhere

This happens *before* position embeddings are added: e* is a word like any other, and may stand anywhere.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from e4t_jax.arrays import Array
from e4t_jax.errors import UserError, shortened

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PLACEHOLDER = "*s"

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


PLAIN_ENGLISH = (
    "the an my one nice good cute small little large beautiful close up closeup picture image rendering depiction drawing "
    "painting portrait view of on in at with and by from for to is it this that new old day night morning evening "
    "standing sitting smiling playing running sleeping flying living person face man woman dog animal thing object "
    "style art very happy sad big tiny wearing under over near beside between behind front two three sky sun moon star"
)
_DOMAIN_WORDS = "creature cat flower building car painting child baby bird horse house tree fish toy"


class TokenizedPrompts(NamedTuple):
    """Token ids, padded, and where among them the concept's word goes."""

    ids: Int[np.ndarray, "batch length"]
    placeholder: Bool[np.ndarray, "batch length"]


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


def known_words() -> list[str]:
    """Every word of this package's prompts, and some common ones: what a tokenizer that is made up should keep whole."""
    media_and_places = [phrase for media, places in SCENES.values() for phrase in (*media, *places)]
    phrases = [*(one for kind in TEMPLATES.values() for one in kind), *media_and_places, PLAIN_ENGLISH, _DOMAIN_WORDS]
    words = {word for phrase in phrases for word in re.findall(r"[a-z0-9]+", phrase.replace(PLACEHOLDER, ""))}
    return sorted(words)


def domain_token_id(tokenizer: "CLIPTokenizer", token: str) -> int:
    """The id of the domain token, whose word embedding e_d is where every concept starts.

    Errors: `UserError` when the tokenizer does not hold the word as ONE token.
    """
    ids = _ids(tokenizer, token)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(tokenizer.convert_ids_to_tokens(ids[:8])) or "nothing"
        raise UserError(
            f"{shortened(token)} is not one token of this tokenizer (it reads {pieces}); choose a more common word.", "domain_token"
        )
    return ids[0]


def check_placeholder(tokenizer: "CLIPTokenizer", placeholder: str) -> None:
    """Makes sure that the placeholder is a word the tokenizer does not know: it means the concept alone.

    Errors: `UserError` when it is empty, holds white space, or is a single token of the vocabulary already.
    """
    if not placeholder or re.search(r"\s", placeholder):
        raise UserError(f"The placeholder {placeholder!r} must be one word, such as {PLACEHOLDER!r}.")
    ids = _ids(tokenizer, placeholder)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        raise UserError(
            f"The placeholder {placeholder!r} is a word of the vocabulary already; choose another, such as {PLACEHOLDER!r}."
        )


def tokenize(
    tokenizer: "CLIPTokenizer",
    prompts: Sequence[str],
    *,
    placeholder: str = PLACEHOLDER,
    domain_token: str = "creature",
    require_placeholder: bool = True,
) -> TokenizedPrompts:
    """Token ids `[BOS, …, EOS, PAD, …]` of length `tokenizer.model_max_length`, the placeholders marked.

    The pieces of the prompt around the placeholder are tokenised apart, so no tokenizer ever has to learn it.

    Errors: `UserError` for a prompt that is too long (cut, it might lose its placeholder), for one without
    the placeholder when `require_placeholder`, and for a placeholder or a domain token that will not do.
    """
    check_placeholder(tokenizer, placeholder)
    domain_id = domain_token_id(tokenizer, domain_token)
    length = tokenizer.model_max_length
    ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    marks = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        pieces = _split(prompt, placeholder)
        if require_placeholder and len(pieces) == 1:
            raise UserError(f"The prompt {shortened(prompt)} lacks the placeholder; write {placeholder!r} in it.")
        tokens, places = [tokenizer.bos_token_id], []
        for piece in pieces:
            tokens += _ids(tokenizer, piece)
            places.append(len(tokens))
            tokens.append(domain_id)
        # One placeholder fewer than pieces: the last one written is where the prompt ends.
        tokens[places.pop()] = tokenizer.eos_token_id
        if len(tokens) > length:
            raise UserError(f"The prompt {shortened(prompt)} has {len(tokens) - 2} tokens, the limit is {length - 2}; shorten it.")
        ids[row, : len(tokens)] = tokens
        marks[row, places] = True
    return TokenizedPrompts(ids, marks)


def inject(
    words: Float[Array, "batch length width"],
    placeholder: Bool[Array, "batch length"],
    concept_word: Float[Array, "batch width"],
) -> Float[Array, "batch length width"]:
    """Puts e* in the placeholder's place, before position embeddings: words_j ← e* where placeholder_j."""
    return jnp.where(placeholder[..., None], concept_word[:, None, :].astype(words.dtype), words)


def _split(prompt: str, placeholder: str) -> list[str]:
    """The pieces of the prompt around the placeholder, a word of its own: there is no "*s" in "*sun"."""
    before = r"(?<!\w)" if re.match(r"\w", placeholder[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", placeholder[-1]) else ""
    # CLIP's tokenizer does not tell upper from lower case, so neither does the placeholder.
    return re.split(before + re.escape(placeholder) + after, prompt, flags=re.IGNORECASE)


def _ids(tokenizer: "CLIPTokenizer", text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # what is too long is said here
