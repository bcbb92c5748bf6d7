"""How the judges learn, and how they are validated on true renders of held-out identities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from e4t_jax.evaluation.judges import HEADS, IdentityJudge, SceneJudge, judge
from e4t_jax.world.attributes import CONTEXTS, Record, hue_word, sample_identities, sample_scenes, take
from e4t_jax.world.pictures import as_floats
from e4t_jax.world.renderer import render

_TEMPERATURE = 0.07


def scene_labels(identities: Record, scenes: Record) -> dict[str, np.ndarray]:
    """Targets of the scene judge; hue and eyes are -1 (no target) where there is no creature."""
    creature = scenes["class"] == 0
    labels = {
        "class": scenes["class"],
        "context": scenes["context"],
        "style": scenes["style"],
        "hue": np.where(creature, hue_word(identities["body_hue"]), -1),
        "eyes": np.where(creature, identities["eyes"], -1),
    }
    return {name: value.astype(np.int32) for name, value in labels.items()}


def identity_views(seed: int, count: int, views: int, *, split: str = "train", **scene) -> tuple[np.ndarray, Record, Record]:
    """`views` pictures of each of `count` creatures, uint8 `[count * views, …]`, one identity after the other."""
    identities = take(sample_identities(seed, count, split=split), np.repeat(np.arange(count), views))
    scenes = sample_scenes(seed, count * views, split=split, **scene)
    return render(identities, scenes)[0], identities, scenes


def degrade(images: Float[Array, "batch h w 3"], key: jax.Array) -> Float[Array, "batch h w 3"]:
    """Blur of random strength, noise, a shift of colour and a shift by up to two pixels: a judge must not read single pixels."""
    blur_key, noise_key, gain_key, tint_key, shift_key = jax.random.split(key, 5)
    count = images.shape[0]
    kernel = jnp.array([0.25, 0.5, 0.25])
    blurred = images
    for axis in (1, 2, 1, 2):
        rolled = [jnp.roll(blurred, offset, axis) for offset in (-1, 0, 1)]
        blurred = sum(weight * part for weight, part in zip(kernel, rolled, strict=True))
    share = jax.random.uniform(blur_key, (count, 1, 1, 1))
    images = images + share * (blurred - images)
    images = images + jax.random.uniform(gain_key, (count, 1, 1, 1)) * 0.08 * jax.random.normal(noise_key, images.shape)
    images = images + 0.04 * jax.random.normal(tint_key, (count, 1, 1, 3))
    shift = jax.random.randint(shift_key, (count, 2), -2, 3)
    return jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(images, shift)


def identity_loss(params: dict, images: Array, who: Array, key: jax.Array):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv 2004.11362): pictures of one identity attract, all others repel."""
    vectors = IdentityJudge().apply({"params": params}, degrade(images, key))
    logits = vectors @ vectors.T / _TEMPERATURE
    itself = jnp.eye(len(who), dtype=bool)
    same = (who[:, None] == who[None]) & ~itself
    log_share = jax.nn.log_softmax(jnp.where(itself, -1e9, logits), axis=-1)
    return -jnp.mean(jnp.sum(jnp.where(same, log_share, 0), -1) / jnp.maximum(same.sum(-1), 1))


def scene_loss(params: dict, images: Array, labels: dict[str, Array], key: jax.Array):
    """Sum of the heads' cross-entropies; a label of -1 counts nothing."""
    logits = SceneJudge().apply({"params": params}, degrade(images, key))
    total = jnp.zeros(())
    for name in HEADS:
        cross = optax.softmax_cross_entropy_with_integer_labels(logits[name], jnp.maximum(labels[name], 0))
        total = total + jnp.mean(jnp.where(labels[name] >= 0, cross, 0.0))
    return total


def make_judge_step(loss, tx: optax.GradientTransformation):
    """`step(params, moments, images, targets, key) -> (params, moments, loss)`, compiled."""

    @jax.jit
    def step(params, moments, images, targets, key):
        value, gradients = jax.value_and_grad(loss)(params, images, targets, key)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return step


def identity_prototypes(params: dict, seed: int, count: int, *, split: str = "test", views: int = 8) -> np.ndarray:
    """Unit vectors of `count` held-out identities: the mean over true renders in many contexts and styles."""
    pictures, _, _ = identity_views(seed, count, views, split=split)
    vectors = judge("identity", params, as_floats(pictures)).reshape(count, views, -1).mean(1)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def validate_judges(judges: dict[str, dict], seed: int, count: int = 64, *, split: str = "test") -> dict[str, float]:
    """Top-1 of both judges on true renders: identity among `count` held-out ones drawn in *other* contexts, and the scene."""
    half = len(CONTEXTS) // 2
    generator = np.random.default_rng([seed, 5])
    gallery, _, _ = identity_views(seed, count, 8, split=split, context=generator.integers(0, half, count * 8))
    who = np.repeat(np.arange(count), 4)
    elsewhere = generator.integers(half, len(CONTEXTS), len(who))
    identities = take(sample_identities(seed, count, split=split), who)
    scenes = sample_scenes(seed + 1_000_003, len(who), split=split, context=elsewhere)
    probes = as_floats(render(identities, scenes)[0])
    prototypes = judge("identity", judges["identity"], as_floats(gallery)).reshape(count, 8, -1).mean(1)
    vectors = judge("identity", judges["identity"], probes)
    logits, labels = judge("scene", judges["scene"], probes), scene_labels(identities, scenes)
    return {
        "judge_identity_top1": float(np.mean(np.argmax(vectors @ prototypes.T, -1) == who)),
        **{f"judge_{head}_top1": float(np.mean(np.argmax(logits[head], -1) == labels[head])) for head in HEADS if head != "class"},
    }
