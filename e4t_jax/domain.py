"""A pretrained domain: a base model, the encoder and weight offsets learned on it, and what a user does with them.

domain = load_domain("creatures")
concepts = domain.tune(["venus.png", "ada.png"], steps=5)
images = domain.generate(concepts, ["a photo of *s in the snow"], seed=0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PRNGKeyArray, UInt8
from PIL import Image

from e4t_jax.arrays import Array
from e4t_jax.bases import Base, Params
from e4t_jax.captioning import pick_captions, read_scene
from e4t_jax.concept import Concept, stack
from e4t_jax.data.images import PictureLike, read_image
from e4t_jax.data.views import make_views
from e4t_jax.encode import Encoders, encode_pictures
from e4t_jax.errors import UserError
from e4t_jax.objective import Frozen, Method, Trainable, fold, make_method
from e4t_jax.offsets import Factors
from e4t_jax.prompts import PLACEHOLDER, TokenizedPrompts, scene_captions, tokenize
from e4t_jax.sample import SampleSettings, sample_images
from e4t_jax.samplers import Sampler, own_method, sampler
from e4t_jax.storage import fingerprint
from e4t_jax.training.tune import Recipe, TuneSettings, Views, tune_many

_VIEWS = 6
_PROMPTS = 8  # of each picture whose caption is read off it, so that doubt between captions shows
CONCEPTS_PER_CALL = 16
Track = Callable[[Iterable], Iterable]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Domain:
    """Base, encoder and offsets; all arrays, nothing hidden."""

    base_name: str
    domain_token: str
    base: Base
    params: Params  # the base's weights
    encoder: Params
    factors: Factors
    scale: float = 0.1
    regularisation: float = 0.01  # λ of pretraining, and of tuning
    guidance: float = 7.5  # classifier-free, where a call names none
    template: str = "neutral"  # the kind of captions to look for (`prompts.SCENES`)
    image_encoder: str | None = None  # name of CLIP's, where the base brings none
    clip_features: str = "layers"  # what of CLIP's the encoder sees

    def __repr__(self) -> str:
        return f"Domain({self.domain_token!r}, base={self.base_name!r}, {self.base.image_size} px, {self.fingerprint})"

    @cached_property
    def method(self) -> Method:
        return make_method(self.base, self.domain_token, self.scale, self.clip_features)

    @property
    def frozen(self) -> Frozen:
        """What tuning and generation read and never change."""
        return Frozen(self.params["unet"], self.params["text_encoder"], self.factors, self.encoder)

    @cached_property
    def fingerprint(self) -> str:
        unet = self.params["unet"]
        # Stable Diffusion's first layer tells its versions apart; of another model, all is read.
        return fingerprint({"conv_in": unet["conv_in"]} if "conv_in" in unet else unet, self.encoder, self.factors)

    def tune(
        self,
        images: Sequence[PictureLike],
        settings: TuneSettings | None = None,
        *,
        caption: str | Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        track: Track = iter,
        **changes: Any,
    ) -> list[Concept]:
        """Concepts of pictures (files, PIL pictures or arrays), some dozen tuned at once by one compiled call.

        `changes` are single fields of `settings`: `domain.tune(paths, steps=5)`. `caption` tells what the pictures show around
        `*s` ("a photo of *s in a meadow"), one for all or one a picture; where not given, the base reads it off each picture
        (`captioning`). `names` are those of the concepts; files lend theirs. `track` wraps the loop over the calls.

        Errors: `UserError` for a picture that cannot be read, a missing mask, a caption without the placeholder, settings out
        of range, or a loss that is not finite.
        """
        settings = _changed(settings or TuneSettings(), changes)
        recipe = settings.recipe(self.regularisation)
        if not len(images):
            raise UserError("there is no picture; give one or more.", "images")
        captions = [caption] * len(images) if isinstance(caption, str) else caption
        if captions is not None and len(captions) != len(images):
            raise UserError(f"there are {len(captions)} for {len(images)} pictures; give one for all, or one for each.", "caption")
        names = names or [_name(image, row) for row, image in enumerate(images)]
        tokens = None if captions is None else self.tokenize(captions)
        pictures, masks = zip(*(self._read(image, settings.mask) for image in images), strict=True)
        concepts: list[Concept] = []
        for rows in track(_chunks(len(images))):
            own_pictures, own_masks = (np.stack([part[row] for row in rows]) for part in (pictures, masks))
            own_tokens = None if tokens is None else tuple(part[rows] for part in tokens)
            concepts += self._tune_chunk(own_pictures, own_masks, own_tokens, [names[row] for row in rows], recipe, settings.seed)
        return concepts[: len(images)]

    def _read(self, image: PictureLike, mask: str) -> tuple[np.ndarray, np.ndarray]:
        picture, found = read_image(image, self.base.image_size, use_mask=mask != "none")
        if found is None and mask == "file":
            raise UserError(
                f"{_name(image, 0)} has none; give it an alpha channel or a NAME.mask.png beside it, or leave it.", "mask"
            )
        return picture, np.ones(picture.shape[:2], np.float32) if found is None else found

    def _tune_chunk(self, pictures, masks, tokens: tuple | None, names: Sequence[str], recipe: Recipe, seed: int) -> list[Concept]:
        views_key, caption_key, tune_key = jax.random.split(jax.random.key(seed), 3)
        encoders = Encoders(self.params["vae"], self.params["image_encoder"])
        views = _prepare_views(self.base, self.clip_features, encoders, pictures, masks, views_key)
        trainables = [Trainable()] * len(names)
        if recipe.steps:
            if tokens is None:
                prompts = self._read_prompts(views, caption_key)
            else:
                prompts = tuple(jnp.asarray(part)[:, None] for part in tokens)
            tuned, losses = tune_many(self.method, self.frozen, views, prompts, tune_key, recipe)
            finite = np.isfinite(np.asarray(losses)).all(axis=1)
            for leaf in jax.tree.leaves(tuned):
                finite &= np.isfinite(np.asarray(leaf)).all(axis=tuple(range(1, leaf.ndim)))
            if not finite.all():
                raise UserError(f"{names[int(np.argmin(finite))]} came out not finite; lower it or the steps.", "learning_rate")
            trainables = [jax.tree.map(lambda leaf, i=i: leaf[i], tuned) for i in range(len(names))]
        return [
            Concept(name, recipe.scope, self.fingerprint, trainable, fold(self.method, trainable, self.frozen, clip[None])[0])
            for name, trainable, clip in zip(names, trainables, views.clip, strict=True)
        ]

    def _read_prompts(self, views: Views, key: PRNGKeyArray) -> tuple[Array, ...]:
        """Tokens of what the base reads off each picture, `[concepts, prompts, length]`."""
        grid = scene_captions(self.template)
        ids, placeholder = (
            jnp.asarray(part).reshape(len(grid), len(grid[0]), -1) for part in self.tokenize([one for row in grid for one in row])
        )
        picked = _read_captions(self.method, self.frozen, views.latents[:, 0], views.clip, ids, placeholder, key)
        return tuple(part.reshape(-1, part.shape[-1])[picked] for part in (ids, placeholder))

    def generate(
        self,
        concepts: Sequence[Concept],
        prompts: Sequence[str],
        settings: SampleSettings | None = None,
        *,
        track: Track = iter,
        **changes: Any,
    ) -> UInt8[np.ndarray, "concepts prompts h w 3"]:
        """Every concept in every prompt; noise depends on seed and prompt alone. `to_pil` makes Pillow pictures of the result.

        `changes` are single fields of `settings`: `domain.generate(concepts, prompts, seed=1)`.

        Errors: `UserError` for a prompt without the placeholder, an unknown sampler, settings out of range, concepts of another
        domain, or pictures that are not finite.
        """
        settings = _changed(settings or SampleSettings(), changes)
        settings.check()
        if not len(concepts):
            raise UserError("there is no concept; give one or more.", "concepts")
        for concept in concepts:
            if concept.domain != self.fingerprint:
                raise UserError(f"{concept.name} was tuned in another domain or on another base.", "concepts")
        tokens = self.tokenize(prompts)
        drawn = [
            self._draw(self.frozen, *stack([concepts[row] for row in rows]), tokens, settings)
            for rows in track(_chunks(len(concepts)))
        ]
        return np.concatenate(drawn)[: len(concepts)]

    def generate_class(
        self, count: int, prompts: Sequence[str], settings: SampleSettings | None = None, **changes: Any
    ) -> UInt8[np.ndarray, "count prompts h w 3"]:
        """What the base model draws, without encoder, offsets or concept, when `*s` is read as the domain's word."""
        settings = _changed(settings or SampleSettings(), changes)
        settings.check()
        ids, placeholder = self.tokenize(prompts)
        folded = jnp.zeros((1, self.base.clip_width))
        frozen = self.frozen._replace(factors=None)
        drawn = self._draw(frozen, Trainable(), folded, TokenizedPrompts(ids, np.zeros_like(placeholder)), settings)
        return np.repeat(drawn, count, axis=0)

    def _draw(self, frozen: Frozen, trainables: Trainable, folded: Array, tokens: TokenizedPrompts, settings: SampleSettings):
        noise_key, step_key = jax.random.split(jax.random.key(settings.seed))
        noise = jax.random.normal(noise_key, (1, len(tokens.ids), *self.base.latent_shape))
        noise = jnp.broadcast_to(noise, (len(folded), *noise.shape[1:]))
        images = sample_images(
            self.method,
            self.sampler(settings),
            trainables,
            frozen,
            self.params["vae"],
            folded,
            *(jnp.asarray(part) for part in tokens),
            noise,
            self.guidance if settings.guidance is None else settings.guidance,
            step_key,
        )
        pixels = np.asarray(jnp.round((images + 1) * 127.5))
        if not np.isfinite(pixels).all():
            raise UserError("the pictures came out not finite; lower the guidance, or tune at a lower rate.", "concepts")
        return pixels.astype(np.uint8)

    def sampler(self, settings: SampleSettings) -> Sampler:
        """The sampler that the settings ask for, on this base.

        Errors: `UserError` for one that is unknown, and for more steps than it can take.
        """
        method = own_method(self.base.scheduler) if settings.sampling is None else settings.sampling
        return sampler(self.method.schedule, method, settings.steps)

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Token ids of the prompts, the domain's word in the placeholder's place, and where that is."""
        return tokenize(self.base.tokenizer, prompts, placeholder=PLACEHOLDER, domain_token=self.domain_token)


def to_pil(images: UInt8[np.ndarray, "concepts prompts h w 3"]) -> list[list[Image.Image]]:
    """Pillow pictures of what `Domain.generate` returns: a list a concept, a picture a prompt."""
    return [[Image.fromarray(image) for image in row] for row in images]


def _changed(settings: Any, changes: dict[str, Any]) -> Any:
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(settings)})
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(settings))
        raise UserError(f"{unknown[0]!r} is no setting; there are {known}.")
    return dataclasses.replace(settings, **changes) if changes else settings


def _name(image: PictureLike, row: int) -> str:
    return Path(image).stem if isinstance(image, str | Path) else f"concept_{row}"


def _chunks(count: int) -> list[list[int]]:
    """Rows 0 … count - 1 in calls of one size, so that one program serves all; the last takes some of the first again."""
    size = min(count, CONCEPTS_PER_CALL)
    return [[row % count for row in range(start, start + size)] for start in range(0, count, max(size, 1))]


@jax.jit
def _read_captions(method, frozen, latents, clip, ids, placeholder, key) -> Int[Array, "concepts prompts"]:
    def read(own_latents, own_clip):
        return pick_captions(read_scene(method, frozen, own_latents, own_clip, ids, placeholder, key), _PROMPTS)

    return jax.vmap(read)(latents, clip)


@partial(jax.jit, static_argnames=("base", "clip_features"))
def _prepare_views(base: Base, clip_features: str, encoders: Encoders, pictures, masks, key) -> Views:
    images, view_masks = jax.vmap(lambda picture, mask: make_views(picture, mask, key, _VIEWS))(pictures, masks)
    flat_images, flat_masks = (part.reshape(-1, *part.shape[2:]) for part in (images, view_masks))
    latents, clip, small = encode_pictures(base, clip_features, encoders, flat_images, flat_masks, pictures)
    shape = images.shape[:2]
    return Views(latents.reshape(*shape, *latents.shape[1:]), clip, small.reshape(*shape, *small.shape[1:]))
