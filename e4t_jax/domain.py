"""A pretrained domain: a base model, the encoder and weight offsets learned on it, and what a user does with them.

domain = load_domain("creatures")
concepts = domain.tune(["venus.png", "ada.png"], steps=5)
images = domain.generate(concepts, ["a photo of *s in the snow"], seed=0)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray
from safetensors.numpy import save

from e4t_jax import backbone
from e4t_jax.backbone import Base, Params
from e4t_jax.concept import FORMAT, Concept, header_json, pack_header, read_tensors, stack
from e4t_jax.data.augment import make_views, shrink_mask
from e4t_jax.data.images import read_image
from e4t_jax.diffusion import noise_schedule
from e4t_jax.encoder import ConceptEncoder
from e4t_jax.errors import UserError
from e4t_jax.objective import Frozen, Method, Trainable
from e4t_jax.offsets import Factors
from e4t_jax.prompts import PLACEHOLDER, TokenizedPrompts, domain_token_id, templates, tokenize
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
    template: str = "neutral"  # the kind of prompts to tune with
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
        template: str | None = None,
        learning_rate: float | None = None,
        word_rate: float | None = None,
    ) -> list[Concept]:
        """Concepts of the pictures, all tuned in one compiled call; a mask (alpha or NAME.mask.png) limits the loss to it.

        Errors: `UserError` for a picture that cannot be read, an unknown scope, or a loss that is not finite.
        """
        read = [read_image(Path(path), self.base.image_size) for path in images]
        pictures = np.stack([picture for picture, _ in read])
        masks = np.stack([np.ones(picture.shape[:2], np.float32) if mask is None else mask for picture, mask in read])
        prompts = [list(templates(template or self.template))] * len(read)
        return self.tune_pictures(
            pictures,
            masks,
            prompts,
            names=[Path(path).stem for path in images],
            steps=steps,
            scope=scope,
            seed=seed,
            learning_rate=learning_rate,
            word_rate=word_rate,
        )

    def tune_pictures(
        self,
        pictures: Float[np.ndarray, "concepts h w 3"],
        masks: Float[np.ndarray, "concepts h w"],
        prompts: Sequence[Sequence[str]],
        *,
        names: Sequence[str],
        steps: int = 5,
        scope: str = "compact",
        seed: int = 0,
        learning_rate: float | None = None,
        word_rate: float | None = None,
    ) -> list[Concept]:
        """`tune` for pictures in memory, with each concept's own training prompts (the same number for all)."""
        if steps < 0:
            raise UserError(f"--steps {steps} is negative; give 0 or more.")
        views_key, tune_key = jax.random.split(jax.random.key(seed))
        views = self._views(pictures, masks, views_key)
        if steps == 0:
            trainables = [Trainable()] * len(names)
        else:
            tokens = [self.tokenize(own) for own in prompts]
            ids, placeholder = (jnp.stack(parts) for parts in zip(*tokens, strict=True))
            rate = _LEARNING_RATES.get(scope, 0.0) if learning_rate is None else learning_rate
            settings = TuneSettings(
                scope,
                steps,
                learning_rate=rate,
                word_rate=_WORD_RATE if word_rate is None else word_rate,
                regularisation=self.regularisation,
            )
            tuned, losses = tune_many(self.method, self.frozen, views, (ids, placeholder), tune_key, settings)
            losses = np.asarray(losses)
            if not np.isfinite(losses).all():
                bad = names[int(np.argmin(np.isfinite(losses).all(axis=1)))]
                raise UserError(f"The loss of {bad} is not finite; lower --learning-rate or --steps.")
            trainables = [jax.tree.map(lambda leaf, i=i: leaf[i], tuned) for i in range(len(names))]
        return [
            Concept(name, scope, self.fingerprint, trainable, self._fold(trainable, clip))
            for name, trainable, clip in zip(names, trainables, views.clip, strict=True)
        ]

    def generate(
        self,
        concepts: Sequence[Concept],
        prompts: Sequence[str],
        *,
        seed: int = 0,
        steps: int = 25,
        guidance: float | None = None,
        sampling: str | None = None,
    ) -> np.ndarray:
        """Every concept in every prompt, uint8 `[concepts, prompts, h, w, 3]`; noise depends on seed and prompt alone.

        `guidance` is the domain's own where not given; `sampling` is one of `samplers.METHODS`, and where not given the base's
        own (scheduler_config.json).

        Errors: `UserError` for a prompt without the placeholder and an unknown sampler.
        """
        ids, placeholder = self.tokenize(prompts)
        trainables, folded = stack(list(concepts))
        return self._draw(self.frozen, trainables, folded, (ids, placeholder), seed, steps, guidance, sampling)

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
