"""How the judges learn, and how they are validated on true renders of held-out identities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.creatures.judging.judges import ATTRIBUTE_HEADS, JUDGES, SCENE_HEADS, WHO_IS_IT, judge
from e4t_jax.creatures.world.attributes import (
    CONTEXTS,
    EARS,
    HATS,
    PATTERNS,
    Record,
    hue_word,
    of_class,
    sample_identities,
    sample_scenes,
    take,
)
from e4t_jax.creatures.world.pictures import as_floats
from e4t_jax.creatures.world.renderer import render
from e4t_jax.process import draw_noise

_TEMPERATURE = 0.07
_STRENGTH = {"scene": 1.0, "attributes": 0.25}


def scene_labels(scenes: Record) -> dict[str, np.ndarray]:
    """Targets of the scene judge."""
    return {name: scenes[name].astype(np.int32) for name in SCENE_HEADS}


def attribute_labels(identities: Record) -> dict[str, np.ndarray]:
    """Targets of the attribute judge; the trim's is -1 (none) on a creature that shows its trim nowhere."""
    named = {"hue": hue_word(identities["body_hue"]), "trim": hue_word(identities["trim_hue"])}
    labels = {name: np.asarray(named.get(name, identities.get(name))).astype(np.int32) for name in ATTRIBUTE_HEADS}
    labels["trim"] = np.where(shows_trim(identities), labels["trim"], -1)
    return labels


def shows_trim(identities: Record) -> np.ndarray:
    """Whether the figure has a part of some size in the hue of its trim: a pattern, inner ears or balls, or a scarf."""
    patterned = identities["pattern"] != PATTERNS.index("plain")
    eared = ~np.isin(identities["ears"], [EARS.index("earless"), EARS.index("horned")])
    return patterned | eared | (identities["hat"] == HATS.index("scarfed"))


def identity_views(
    seed: int, count: int, views: int, *, split: str = "train", kind: str = "creature", **scene
) -> tuple[np.ndarray, Record, Record]:
    """`views` pictures of each of `count` identities of class `kind`, uint8 `[count * views, …]`, one after the other."""
    scene |= of_class(kind)
    identities = take(sample_identities(seed, count, split=split), np.repeat(np.arange(count), views))
    scenes = sample_scenes(seed, count * views, split=split, **scene)
    return render(identities, scenes)[0], identities, scenes


def degrade(images: Float[Array, "batch h w 3"], key: jax.Array, strength: float = 1.0) -> Float[Array, "batch h w 3"]:
    """Blur and noise of random strength, a shift of colour, one by up to two pixels: a judge must not read single pixels.

    `strength` scales noise and colour alone: who reads colours to their word can bear little of either.
    """
    blur_key, noise_key, gain_key, tint_key, shift_key = jax.random.split(key, 5)
    count = images.shape[0]
    kernel = jnp.array([0.25, 0.5, 0.25])
    blurred = images
    for axis in (1, 2, 1, 2):
        rolled = [jnp.roll(blurred, offset, axis) for offset in (-1, 0, 1)]
        blurred = sum(weight * part for weight, part in zip(kernel, rolled, strict=True))
    share = jax.random.uniform(blur_key, (count, 1, 1, 1))
    images = images + share * (blurred - images)
    images = images + strength * jax.random.uniform(gain_key, (count, 1, 1, 1)) * 0.08 * draw_noise(noise_key, images.shape)
    images = images + strength * 0.04 * draw_noise(tint_key, (count, 1, 1, 3))
    shift = jax.random.randint(shift_key, (count, 2), -2, 3)
    return jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(images, shift)


def identity_loss(name: str, params: dict, frozen: None, batch: tuple[Array, Array], key: jax.Array):
    """Supervised contrastive loss of judge `name` (Khosla et al. 2020, arXiv 2004.11362): pictures of one identity attract, all
    others repel.
    """
    images, who = batch
    vectors = JUDGES[name].apply({"params": params}, degrade(images, key))
    logits = vectors @ vectors.T / _TEMPERATURE
    itself = jnp.eye(len(who), dtype=bool)
    same = (who[:, None] == who[None]) & ~itself
    log_share = jax.nn.log_softmax(jnp.where(itself, -1e9, logits), axis=-1)
    loss = -jnp.mean(jnp.sum(jnp.where(same, log_share, 0), -1) / jnp.maximum(same.sum(-1), 1))
    return loss, {"loss": loss}


def label_loss(name: str, params: dict, frozen: None, batch: tuple[Any, dict[str, Array]], key: jax.Array):
    """Sum over the heads of judge `name` of the mean cross-entropy; a label of -1 counts nothing."""
    images, labels = batch
    logits = JUDGES[name].apply({"params": params}, degrade(images, key, _STRENGTH[name]))
    total = jnp.zeros(())
    for head, label in labels.items():
        cross = optax.softmax_cross_entropy_with_integer_labels(logits[head], jnp.maximum(label, 0))
        total = total + jnp.mean(jnp.where(label >= 0, cross, 0.0))
    return total, {"loss": total}


def identity_prototypes(
    judges: dict[str, dict], seed: int, count: int, *, split: str = "test", kind: str = "creature", views: int = 8
) -> np.ndarray:
    """Unit vectors of `count` held-out identities of class `kind`: the mean over true renders in many contexts and styles."""
    pictures, _, _ = identity_views(seed, count, views, split=split, kind=kind)
    who = WHO_IS_IT[kind]
    vectors = judge(who, judges[who], as_floats(pictures)).reshape(count, views, -1).mean(1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def validate_judges(
    judges: dict[str, dict], seed: int, count: int = 64, *, split: str = "test", kind: str = "creature"
) -> dict[str, float]:
    """Top-1 of the judges of class `kind` on true renders: identity among `count` held-out ones drawn in *other* contexts,
    context and style, and of creatures their attributes.
    """
    who_is_it = WHO_IS_IT[kind]
    half = len(CONTEXTS) // 2
    generator = np.random.default_rng([seed, 5])
    gallery, _, _ = identity_views(seed, count, 8, split=split, kind=kind, context=generator.integers(0, half, count * 8))
    who = np.repeat(np.arange(count), 4)
    elsewhere = generator.integers(half, len(CONTEXTS), len(who))
    identities = take(sample_identities(seed, count, split=split), who)
    scenes = sample_scenes(seed + 1_000_003, len(who), split=split, context=elsewhere, **of_class(kind))
    probes = as_floats(render(identities, scenes)[0])
    prototypes = judge(who_is_it, judges[who_is_it], as_floats(gallery)).reshape(count, 8, -1).mean(1)
    vectors = judge(who_is_it, judges[who_is_it], probes)
    scene, attributes = judge("scene", judges["scene"], probes), judge("attributes", judges["attributes"], probes)
    labels = attribute_labels(identities) if kind == "creature" else {}
    return {
        "judge_identity_top1": float(np.mean(np.argmax(vectors @ prototypes.T, -1) == who)),
        **{
            f"judge_{head}_top1": share_right(scene[head], label) for head, label in scene_labels(scenes).items() if head != "class"
        },
        **{f"judge_{head}_top1": share_right(attributes[head], label) for head, label in labels.items()},
    }


def share_right(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures whose largest logit is at their label, among those that have one (-1: none)."""
    return float(np.mean((np.argmax(logits, -1) == labels)[labels >= 0]))
