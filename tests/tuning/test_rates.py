"""Rates are shares of what they move: tuning is the same whatever the scale of a base's words and the width of its layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_tune import write_random

from e4t_jax.bases import StableDiffusion
from e4t_jax.objective import Trainable
from e4t_jax.offsets import delta, init_factors
from e4t_jax.training.optimizers import step_lengths, tuning
from e4t_jax.tuning.scopes import SCOPES

# What feeds the text encoder's residual stream: scaled together, every layer norm sees the same but for its epsilon.
_STREAM = ("token_embedding/embedding", "position_embedding/embedding", "out_proj", "fc2")


def with_words_scaled(domain, scale):
    """The same domain on a base that computes the same, whose word embeddings, and with them s E, are `scale` times as long."""
    configs = {**domain.base.configs, "text_encoder": {**domain.base.configs["text_encoder"], "layer_norm_eps": 1e-12}}
    flat = flatten_dict(domain.params["text_encoder"], sep="/")
    flat = {path: leaf * (scale if any(part in path for part in _STREAM) else 1) for path, leaf in flat.items()}
    return dataclasses.replace(
        domain,
        base=StableDiffusion(configs, domain.base.tokenizer),
        params={**domain.params, "text_encoder": unflatten_dict(flat, sep="/")},
        encoder={**domain.encoder, "final": jax.tree.map(lambda leaf: scale * leaf, domain.encoder["final"])},
    )


@pytest.mark.compiles
@pytest.mark.parametrize("scope", ["compact", pytest.param("head", marks=pytest.mark.slow)])
def test_the_scale_of_the_words_changes_no_picture(domain, tmp_path, scope):
    """Words 0.1 and 10 times as long: the pictures after five steps are those of words as they are, to 2/255. They would not be at
    rates that are lengths, and five steps change more than that."""
    paths, prompts = write_random(tmp_path, 1), ["a photo of *s in the snow", "*s"]
    rates = {"learning_rate": 0.02, "word_rate": 1.0}

    def drawn(scale, **changes):
        own = with_words_scaled(domain, scale)
        concepts = own.tune(paths, scope=scope, caption="a photo of *s", **{"steps": 5, "batch_size": 4, **rates, **changes})
        return own.generate(concepts, prompts, steps=4).astype(int)

    plain = drawn(1.0)
    assert np.abs(plain - drawn(1.0, steps=0)).max() > 8
    for scale in (0.1, 10.0):
        assert np.abs(drawn(scale) - plain).max() <= 2
        if scope == "compact":
            assert np.abs(drawn(scale, word_rate=1.0 / scale) - plain).max() > 2


@pytest.mark.parametrize("steady", [False, True])
def test_offsets_move_the_weights_by_the_same_share_at_every_width(steady):
    """RMS of Δ after five steps of scope compact on an attention kernel of 64, 320 and 1280, within a factor of 1.5.

    Isolated from any network: ∂loss/∂Δ = W ⊙ ∂loss/∂W' is a random normal matrix, another at every step or the same at all.
    """

    def moved(width):
        key = jax.random.key(width)
        factors = init_factors(key, {"to_q": jnp.zeros((width, width))}, rank=1)
        trainable, scope = Trainable(factors), SCOPES["compact"]
        lengths = step_lengths(trainable, learning_rate=scope.learning_rate, word_rate=0.0, word_unit=1.0)
        tx = tuning(trainable, lengths, 5)
        moments = tx.init(trainable)
        for step in range(5):
            gradient = jax.random.normal(jax.random.fold_in(key, 0 if steady else step), (width, width))
            _, back = jax.vjp(lambda own: delta(own.factors["to_q"]), trainable)
            changes, moments = tx.update(back(gradient)[0], moments, trainable)
            trainable = optax.apply_updates(trainable, changes)
        return float(jnp.sqrt(jnp.mean(delta(trainable.factors["to_q"]) ** 2)))

    rms = [moved(width) for width in (64, 320, 1280)]
    assert max(rms) < 1.5 * min(rms)
    assert SCOPES["compact"].learning_rate < min(rms) < 10 * SCOPES["compact"].learning_rate


def test_first_steps_are_as_long_as_their_shares_say():
    """Restated in NumPy for a tensor of each kind; relative 1e-6."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)  # noqa: E731
    trainable = Trainable(
        factors={"to_v": {"rows": draw(9, 3), "columns": draw(25, 3)}},
        encoder={"final": {"kernel": draw(4, 6), "bias": draw(6)}, "shared_kernel": draw(8, 16)},
        residual=draw(6),
        unet={"conv": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)}},
    )
    lengths = step_lengths(trainable, learning_rate=0.01, word_rate=0.1, word_unit=7.0)
    tx = tuning(trainable, lengths, 5)
    changes, _ = tx.update(jax.tree.map(lambda leaf: 3 * leaf + 1, trainable), tx.init(trainable), trainable)
    expected = Trainable(
        factors={"to_v": {"rows": 0.03, "columns": 0.05}},
        encoder={"final": {"kernel": 0.07, "bias": 0.07}, "shared_kernel": 0.04},
        residual=0.7,
        unet={"conv": {"kernel": 0.02, "bias": 0.02}},
    )
    found = jax.tree.map(lambda leaf: float(np.linalg.norm(leaf)), changes)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6), found, expected)
