"""A pretrained domain: a base model, the encoder and weight offsets learned on it, and what a user does with them.

domain = load_domain("creatures")
concepts = domain.tune(["venus.png", "ada.png"], steps=5)
images = domain.generate(concepts, ["a photo of *s in the snow"], seed=0)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int, PRNGKeyArray
from safetensors.numpy import save

from e4t_jax import backbone
from e4t_jax.backbone import Base, Params
from e4t_jax.captioning import pick_captions, read_scene
from e4t_jax.concept import FORMAT, Concept, header_json, pack_header, read_tensors, stack
from e4t_jax.data.augment import make_views, shrink_mask
from e4t_jax.data.images import read_image
from e4t_jax.diffusion import noise_schedule
from e4t_jax.encoder import ConceptEncoder
from e4t_jax.errors import UserError
from e4t_jax.objective import Frozen, Method, Trainable
from e4t_jax.offsets import Factors
from e4t_jax.prompts import PLACEHOLDER, TokenizedPrompts, domain_token_id, scene_captions, tokenize
from e4t_jax.sample import sample_images
from e4t_jax.samplers import own_method, sampler
from e4t_jax.tune import TuneSettings, Views, tune_many
from e4t_jax.world.tokenizer import build_tokenizer
from e4t_jax.writing import write_file

_ASSETS = Path(__file__).parent / "world" / "assets"
_BASES = {"creatures": _ASSETS / "base"}
_DOMAINS = {"creatures": _ASSETS / "creatures"}
_PAPERS_IMAGE_ENCODER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_VIEWS = 6
_PROMPTS = 8  # of each picture whose caption is read off it, so that doubt between captions shows
CONCEPTS_PER_CALL = 16
MASKS = ("auto", "none", "file")
# Length of a step (see `tune`) by scope, and that of the word; compact's and the word's were chosen on validation identities.
_LEARNING_RATES = {"compact": 0.05, "head": 0.05, "full": 0.02}
_WORD_RATE = 0.2


def load_base(name: str, image_encoder: str | None = None) -> tuple[Base, Params]:
    """A base model by name: "creatures", a folder in the diffusers layout, a Hub id, "random:sd15" or "random:sd21".

    `image_encoder` names CLIP's for bases that bring none: a folder or Hub id in transformers' format, "random:vit-l14" or
    "random:vit-h14"; the paper's ViT-H/14 where not given.

    Errors: `UserError` for a name that leads nowhere, and for files that are missing, damaged or of another architecture.
    """
    if name.startswith("random:"):
        configs = backbone.geometry(name.removeprefix("random:"), (image_encoder or "random:vit-h14").removeprefix("random:"))
        tokenizer = build_tokenizer(backbone.TEXT_LENGTH, backbone.VOCABULARY)
        base = Base(configs, tokenizer)
        return base, backbone.random_params(base, jax.random.key(0))
    folder = backbone.find_folder(_BASES.get(name, name), "--base")
    own = (folder / "image_encoder" / "config.json").exists()
    if own and image_encoder is None:
        return backbone.load_base(folder)
    seeing = backbone.find_folder(image_encoder or _PAPERS_IMAGE_ENCODER, "--image-encoder", backbone.IMAGE_ENCODER_FILES)
    return backbone.load_base(folder, image_encoder=seeing)


def make_method(base: Base, domain_token: str, scale: float = 0.1, clip_features: str = "layers") -> Method:
    """The static side of a domain on this base; `clip_features` is what the encoder sees (`backbone.image_features`).

    Errors: `UserError` when the domain token is not one token.
    """
    empty = base.tokenizer("", padding="max_length", max_length=base.tokenizer.model_max_length).input_ids
    return Method(
        base=base,
        encoder=ConceptEncoder(backbone.feature_count(base, clip_features), base.clip_width, base.text_width),
        schedule=noise_schedule(base.scheduler),
        empty_ids=jnp.asarray([empty]),
        domain_id=jnp.asarray(domain_token_id(base.tokenizer, domain_token)),
        scale=scale,
    )


def fingerprint(*trees: Any) -> str:
    """A short hash of some trees, in float16: files of a domain know by it what they belong to.

    Of a large leaf, a thousand numbers spread over it are read: no retrained model leaves them all as they were.
    """
    digest = hashlib.sha256()
    for tree in trees:
        for path, leaf in sorted(flatten_dict(tree, sep="/").items()):
            sample = jnp.ravel(leaf)[:: max(1, leaf.size // 1000)]
            digest.update(path.encode() + np.asarray(sample, np.float16).tobytes())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
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

    @cached_property
    def method(self) -> Method:
        return make_method(self.base, self.domain_token, self.scale, self.clip_features)

    @property
    def frozen(self) -> Frozen:
        """What tuning and generation read and never change."""
        return Frozen(self.params["unet"], self.params["text_encoder"], self.factors, self.encoder)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint({"conv_in": self.params["unet"]["conv_in"]}, self.encoder, self.factors)

    def tune(
        self,
        images: Sequence[str | Path],
        *,
        steps: int = 5,
        scope: str = "compact",
        seed: int = 0,
        caption: str | Sequence[str] | None = None,
        mask: str = "auto",
        learning_rate: float | None = None,
        word_rate: float | None = None,
        track: Callable[[Iterable], Iterable] = iter,
    ) -> list[Concept]:
        """Concepts of the pictures, some dozen tuned at once by one compiled call; `track` wraps the loop over the calls.

        `caption` tells what the pictures show around `*s` ("a photo of *s in a meadow"), one for all or one a picture; where
        not given, the base reads it off each picture (`captioning`). `mask` limits the loss to the concept: "auto" takes an
        alpha channel or NAME.mask.png where there is one, "file" insists on it, "none" leaves it aside.

        Errors: `UserError` for a picture that cannot be read, a missing mask, a caption without the placeholder, an unknown
        scope, or a loss that is not finite.
        """
        if mask not in MASKS:
            raise UserError(f"--mask {mask!r} is unknown; choose one of {', '.join(MASKS)}.")
        if steps < 0:
            raise UserError(f"--steps {steps} is negative; give 0 or more.")
        captions = [caption] * len(images) if isinstance(caption, str) else caption
        if captions is not None and len(captions) != len(images):
            raise UserError(f"There are {len(captions)} captions for {len(images)} pictures; give one for all, or one for each.")
        pictures, masks = zip(*(self._read(Path(path), mask) for path in images), strict=True)
        settings = self._settings(scope, steps, learning_rate, word_rate)
        concepts: list[Concept] = []
        for rows in track(_chunks(len(images))):
            names = [Path(images[row]).stem for row in rows]
            own_pictures, own_masks = (np.stack([part[row] for row in rows]) for part in (pictures, masks))
            own_captions = None if captions is None else [captions[row] for row in rows]
            concepts += self._tune_chunk(own_pictures, own_masks, own_captions, names, settings, seed)
        return concepts[: len(images)]

    def _read(self, path: Path, mask: str) -> tuple[np.ndarray, np.ndarray]:
        picture, found = read_image(path, self.base.image_size)
        if found is None and mask == "file":
            raise UserError(f"{path} has no mask; give it an alpha channel or a {path.stem}.mask.png, or leave --mask file.")
        if found is None or mask == "none":
            found = np.ones(picture.shape[:2], np.float32)
        return picture, found

    def _settings(self, scope: str, steps: int, learning_rate: float | None, word_rate: float | None) -> TuneSettings:
        rate = _LEARNING_RATES.get(scope, 0.0) if learning_rate is None else learning_rate
        word = _WORD_RATE if word_rate is None else word_rate
        return TuneSettings(scope, steps, learning_rate=rate, word_rate=word, regularisation=self.regularisation)

    def _tune_chunk(self, pictures, masks, captions: list[str] | None, names: list[str], settings: TuneSettings, seed: int):
        views_key, caption_key, tune_key = jax.random.split(jax.random.key(seed), 3)
        views = self._views(pictures, masks, views_key)
        trainables = [Trainable()] * len(names)
        if settings.steps:
            prompts = self._prompts(views, captions, caption_key)
            tuned, losses = tune_many(self.method, self.frozen, views, prompts, tune_key, settings)
            finite = np.isfinite(np.asarray(losses)).all(axis=1)
            if not finite.all():
                raise UserError(f"The loss of {names[int(np.argmin(finite))]} is not finite; lower --learning-rate or --steps.")
            trainables = [jax.tree.map(lambda leaf, i=i: leaf[i], tuned) for i in range(len(names))]
        return [
            Concept(name, settings.scope, self.fingerprint, trainable, self._fold(trainable, clip))
            for name, trainable, clip in zip(names, trainables, views.clip, strict=True)
        ]

    def _prompts(self, views: Views, captions: list[str] | None, key: PRNGKeyArray) -> tuple[Array, ...]:
        """Tokens of each picture's prompts `[concepts, prompts, length]`: the caption given, or what the base reads off it."""
        if captions is not None:
            return tuple(jnp.asarray(part)[:, None] for part in self.tokenize(captions))
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
        *,
        seed: int = 0,
        steps: int = 25,
        guidance: float | None = None,
        sampling: str | None = None,
        track: Callable[[Iterable], Iterable] = iter,
    ) -> np.ndarray:
        """Every concept in every prompt, uint8 `[concepts, prompts, h, w, 3]`; noise depends on seed and prompt alone.

        `guidance` is the domain's own where not given; `sampling` is one of `samplers.METHODS`, and where not given the base's
        own (scheduler_config.json).

        Errors: `UserError` for a prompt without the placeholder and an unknown sampler.
        """
        tokens = self.tokenize(prompts)
        drawn = [
            self._draw(self.frozen, *stack([concepts[row] for row in rows]), tokens, seed, steps, guidance, sampling)
            for rows in track(_chunks(len(concepts)))
        ]
        return np.concatenate(drawn)[: len(concepts)]

    def generate_class(self, count: int, prompts: Sequence[str], **options: Any) -> np.ndarray:
        """What the base model draws, without encoder, offsets or concept, when `*s` is read as the domain's word."""
        ids, placeholder = self.tokenize(prompts)
        options = {"seed": 0, "steps": 25, "guidance": None, "sampling": None, **options}
        folded = jnp.zeros((1, self.base.clip_width))
        frozen = self.frozen._replace(factors=None)
        drawn = self._draw(frozen, Trainable(), folded, (ids, np.zeros_like(placeholder)), **options)
        return np.repeat(drawn, count, axis=0)

    def _draw(self, frozen, trainables, folded, tokens, seed, steps, guidance, sampling) -> np.ndarray:
        noise_key, step_key = jax.random.split(jax.random.key(seed))
        noise = jax.random.normal(noise_key, (1, len(tokens[0]), *self.base.latent_shape))
        noise = jnp.broadcast_to(noise, (len(folded), *noise.shape[1:]))
        images = sample_images(
            self.method,
            sampler(self.method.schedule, sampling or own_method(self.base.scheduler), steps),
            trainables,
            frozen,
            self.params["vae"],
            folded,
            *tokens,
            noise,
            self.guidance if guidance is None else guidance,
            step_key,
        )
        return np.asarray(jnp.round((images + 1) * 127.5), np.uint8)

    def tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        """Token ids of the prompts, the domain's word in the placeholder's place, and where that is."""
        return tokenize(self.base.tokenizer, prompts, placeholder=PLACEHOLDER, domain_token=self.domain_token)

    def _fold(self, trainable: Trainable, clip: Array) -> Array:
        encoder = self.encoder if trainable.encoder is None else trainable.encoder
        return self.method.encoder.apply({"params": encoder}, clip[None], method="fold")[0]

    def _views(self, pictures: np.ndarray, masks: np.ndarray, key: PRNGKeyArray) -> Views:
        weights = self.params["vae"], self.params["image_encoder"]
        return _prepare_views(self.base, self.clip_features, *weights, pictures, masks, key)


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
def _prepare_views(base: Base, clip_features: str, vae: Params, image_encoder: Params, pictures, masks, key) -> Views:
    images, view_masks = jax.vmap(lambda picture, mask: make_views(picture, mask, key, _VIEWS))(pictures, masks)
    latents = backbone.encode_images(base, {"vae": vae}, images.reshape(-1, *images.shape[2:]))
    small = shrink_mask(view_masks.reshape(-1, *view_masks.shape[2:]), latents.shape[1])
    clip = backbone.image_features(base, {"image_encoder": image_encoder}, pictures, clip_features)
    shape = images.shape[:2]
    return Views(latents.reshape(*shape, *latents.shape[1:]), clip, small.reshape(*shape, *small.shape[1:]))


def save_domain(folder: Path, domain: Domain, dtype: Any = np.float16) -> None:
    """Writes domain.json, encoder.safetensors and offsets.safetensors."""
    header = {"format": str(FORMAT), "kind": "e4t domain"}
    for name, tree in (("encoder", domain.encoder), ("offsets", domain.factors)):
        flat = flatten_dict(tree, sep="|")
        content = save({key: np.asarray(leaf, dtype) for key, leaf in flat.items()}, pack_header(header))
        write_file(Path(folder) / f"{name}.safetensors", content)
    facts = {"format": FORMAT, "base": domain.base_name, "domain_token": domain.domain_token, "scale": domain.scale}
    facts |= {"regularisation": domain.regularisation, "guidance": domain.guidance}
    facts |= {"template": domain.template, "image_encoder": domain.image_encoder, "clip_features": domain.clip_features}
    facts["base_fingerprint"] = fingerprint(domain.params["unet"], domain.params["text_encoder"])
    write_file(Path(folder) / "domain.json", header_json(facts))


def load_domain(name: str | Path = "creatures") -> Domain:
    """A domain by name ("creatures", shipped with the package) or folder.

    Errors: `UserError` for a folder that is missing, damaged, of a newer format, or whose base has other weights.
    """
    folder = _DOMAINS.get(str(name), Path(name))
    try:
        facts = json.loads((folder / "domain.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--domain {name}: {folder / 'domain.json'} does not exist; give a folder of train.pretrain.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{folder / 'domain.json'} is damaged; make or copy the domain again.") from None
    if facts["format"] > FORMAT:
        raise UserError(f"{folder} has format {facts['format']}, this version reads up to {FORMAT}; update e4t-jax.")
    seeing = facts["image_encoder"]
    if seeing and (folder / seeing).is_dir():
        seeing = str(folder / seeing)  # one that came with the domain
    base, params = load_base(facts["base"], seeing)
    if facts["base_fingerprint"] != fingerprint(params["unet"], params["text_encoder"]):
        raise UserError(f"--domain {name} was pretrained on other weights than {facts['base']} holds now; pretrain it again.")
    parts = [
        unflatten_dict(read_tensors(folder / f"{part}.safetensors", "e4t domain", "part of a domain")[0], sep="|")
        for part in ("encoder", "offsets")
    ]
    encoder, factors = parts
    options = {name: facts[name] for name in ("scale", "regularisation", "guidance", "template", "image_encoder", "clip_features")}
    return Domain(facts["base"], facts["domain_token"], base, params, encoder, factors, **options)
