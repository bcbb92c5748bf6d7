"""A trial of personalisation in the drawn world: held-out identities, one picture each, other scenes to draw them in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from e4t_jax import backbone
from e4t_jax.concept import Concept
from e4t_jax.domain import Domain
from e4t_jax.evaluation.judge_training import identity_prototypes
from e4t_jax.evaluation.judges import judge
from e4t_jax.prompts import PLACEHOLDER
from e4t_jax.world.attributes import CONTEXTS, STYLES, Record, sample_identities, sample_scenes, take
from e4t_jax.world.captions import sentence
from e4t_jax.world.pictures import as_floats
from e4t_jax.world.renderer import render

GALLERY = 64  # identities among which a generated picture must find its own
_CHUNK = 16  # concepts a compiled call


class Trial(NamedTuple):
    """What is asked: the pictures given, and the contexts and styles to draw in."""

    seed: int
    split: str
    identities: Record
    pictures: UInt8[np.ndarray, "concepts h w 3"]
    masks: UInt8[np.ndarray, "concepts h w"]
    captions: list[str]  # of the pictures given
    contexts: np.ndarray
    styles: np.ndarray

    @property
    def prompts(self) -> list[str]:
        """The prompts to draw."""
        pairs = zip(self.styles, self.contexts, strict=True)
        return [sentence(int(style), PLACEHOLDER, int(context), [], named=True) for style, context in pairs]


def held_out(seed: int, count: int, prompts: int = 4, *, split: str = "test") -> Trial:
    """`count` identities of a seed, a photo of each, and prompts in contexts that none of the photos shows."""
    generator = np.random.default_rng([seed, 9])
    order = generator.permutation(len(CONTEXTS))
    asked = np.resize(order[: min(prompts, len(CONTEXTS) - 2)], prompts)
    given = generator.choice(np.setdiff1d(order, asked), count)
    styles = np.resize(generator.permutation(len(STYLES)), prompts)
    identities = take(sample_identities(seed, max(count, GALLERY), split=split), slice(0, count))
    scenes = sample_scenes(seed, count, split=split, context=given, style=0)
    pictures, masks = render(identities, scenes)
    captions = [sentence(0, PLACEHOLDER, int(context), [], named=True) for context in given]
    return Trial(seed, split, identities, pictures, masks, captions, asked, styles)


def true_pictures(trial: Trial) -> UInt8[np.ndarray, "concepts prompts h w 3"]:
    """What a perfect artist would draw for every prompt (in a pose of its own)."""
    count, prompts = len(trial.pictures), len(trial.contexts)
    rows = np.repeat(np.arange(count), prompts)
    contexts, styles = np.tile(trial.contexts, count), np.tile(trial.styles, count)
    scenes = sample_scenes(trial.seed + 2_000_003, len(rows), split=trial.split, context=contexts, style=styles)
    pictures = render(take(trial.identities, rows), scenes)[0]
    return pictures.reshape(count, prompts, *pictures.shape[1:])


def tune_trial(
    domain: Domain,
    trial: Trial,
    *,
    steps: int,
    scope: str,
    seed: int = 0,
    learning_rate: float | None = None,
    word_rate: float | None = None,
    track: Callable = iter,
    warm: bool = True,
) -> tuple[list[Concept], float]:
    """Concepts of all pictures, and the median seconds a concept in a compiled call (`warm`: compilation left out)."""
    count = len(trial.pictures)
    size = min(count, _CHUNK)
    concepts: list[Concept] = []
    seconds = []

    def tune(start: int) -> list[Concept]:
        # The last call takes some of the first again rather than compile for another number of concepts.
        rows = np.arange(start, start + size) % count
        return domain.tune_pictures(
            as_floats(trial.pictures[rows]),
            trial.masks[rows].astype(np.float32) / 255,
            [[trial.captions[row]] for row in rows],
            names=[f"{trial.split}_{trial.seed}_{row:03d}" for row in rows],
            steps=steps,
            scope=scope,
            seed=seed,
            learning_rate=learning_rate,
            word_rate=word_rate,
        )

    if warm:
        jax.block_until_ready(tune(0)[0].folded)
    for start in track(range(0, count, size)):
        began = time.perf_counter()
        tuned = tune(start)
        jax.block_until_ready([(concept.trainable, concept.folded) for concept in tuned])
        seconds.append((time.perf_counter() - began) / size)
        concepts += tuned[: count - start]
    return concepts, float(np.median(seconds))


def draw_trial(domain: Domain, trial: Trial, concepts: list[Concept], *, track: Callable = iter, **options) -> np.ndarray:
    """Every concept in every prompt of the trial: uint8 `[concepts, prompts, h, w, 3]`."""
    size = min(len(concepts), _CHUNK)
    drawn = []
    for start in track(range(0, len(concepts), size)):
        rows = np.arange(start, start + size) % len(concepts)
        drawn.append(domain.generate([concepts[row] for row in rows], trial.prompts, **options))
    return np.concatenate(drawn)[: len(concepts)]


def judge_pictures(
    domain: Domain, judges: dict, trial: Trial, images: UInt8[np.ndarray, "concepts prompts h w 3"]
) -> dict[str, float]:
    """What the judges and the base's own CLIP say of the pictures drawn for a trial."""
    count, prompts = images.shape[:2]
    flat = as_floats(images.reshape(-1, *images.shape[2:]))
    who = np.repeat(np.arange(count), prompts)
    prototypes = identity_prototypes(judges["identity"], trial.seed, max(count, GALLERY), split=trial.split)
    likeness = judge("identity", judges["identity"], flat) @ prototypes.T
    scene = judge("scene", judges["scene"], flat)
    seen, given = (_embed_images(domain, part) for part in (flat, as_floats(trial.pictures)))
    ids = domain.tokenize(trial.prompts).ids
    read = _unit(np.asarray(backbone.embed_text(domain.base, domain.params, jnp.asarray(ids))))
    return {
        "identity_top1": float(np.mean(np.argmax(likeness, -1) == who)),
        "identity_similarity": float(np.mean(likeness[np.arange(len(who)), who])),
        "context_top1": float(np.mean(np.argmax(scene["context"], -1) == np.tile(trial.contexts, count))),
        "style_top1": float(np.mean(np.argmax(scene["style"], -1) == np.tile(trial.styles, count))),
        "text_similarity": float(np.mean(np.sum(seen * np.tile(read, (count, 1)), -1))),
        "image_similarity": float(np.mean(np.sum(seen * given[who], -1))),
    }


def _embed_images(domain: Domain, images: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n shared"]:
    embed = jax.jit(lambda params, batch: backbone.embed_image(domain.base, params, batch))
    part = {"image_encoder": domain.params["image_encoder"]}
    return _unit(np.concatenate([np.asarray(embed(part, images[start : start + 64])) for start in range(0, len(images), 64)]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
