"""Tuning: it learns, every scope runs, and a concept in a batch is the concept alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from e4t_jax import domain as domain_module
from e4t_jax.creatures.trial import held_out, write_pictures
from e4t_jax.domain_files import load_domain
from e4t_jax.errors import UserError
from e4t_jax.objective import e4t_loss
from e4t_jax.prompts import tokenize
from e4t_jax.training.tune import Recipe, TuneSettings, Views, draw_batch, start, tune_one


@pytest.fixture(scope="module")
def inputs(domain):
    keys = jax.random.split(jax.random.key(0), 2)
    views = Views(
        jax.random.normal(keys[0], (2, *domain.base.latent_shape)),
        jax.random.normal(keys[1], (domain.base.feature_count(), domain.base.clip_width)),
        jnp.ones((2, *domain.base.latent_shape[:2])),
    )
    return views, tuple(jnp.asarray(part) for part in tokenize(domain.base.tokenizer, ["*s", "a photo of *s"]))


def test_concept_in_a_batch_equals_the_concept_alone(tmp_path):
    """In the shipped domain, with its own settings, from bare files: maximum difference 1e-5 in every trained number."""
    creatures = load_domain("creatures")
    paths = write_pictures(held_out(0, 3, split="validation"), tmp_path, "picture")

    def tune(rows):
        return creatures.tune([paths[row] for row in rows])

    for row, together in enumerate(tune([0, 1, 2])):
        (alone,) = tune([row])
        assert np.abs(together.trainable.residual).max() > 1e-2
        pairs = zip(jax.tree.leaves(together.trainable), jax.tree.leaves(alone.trainable), strict=True)
        for batched, single in (*pairs, (together.folded, alone.folded)):
            np.testing.assert_allclose(batched, single, atol=1e-5)


@pytest.mark.parametrize("scope", ["compact", "head", "full"])
def test_every_scope_starts_where_the_domain_is(domain, scope):
    """Δ = 0, r = 0 and the domain's own encoder and U-Net."""
    trainable = start(domain.method, domain.frozen, scope, jax.random.key(0))
    assert all(np.all(part["columns"] == 0) for part in trainable.factors.values())
    assert trainable.residual is None or np.all(trainable.residual == 0)
    assert trainable.encoder is (None if scope == "compact" else domain.encoder)
    assert trainable.unet is (domain.params["unet"] if scope == "full" else None)


def test_unknown_scope_is_refused(domain):
    with pytest.raises(UserError, match="scope: 'tiny'"):
        start(domain.method, domain.frozen, "tiny", jax.random.key(0))


@pytest.mark.parametrize("scope", ["compact", "head"])
def test_tuning_lowers_the_loss(domain, inputs, scope):
    """By more than 1 %, on draws of timesteps, noise, views and prompts that are the same before and after."""
    recipe = Recipe(scope, 40, 4, learning_rate=0.05, word_rate=0.2, regularisation=0.01)
    views, prompts = inputs
    tuned, _ = jax.jit(tune_one)(domain.method, domain.frozen, views, prompts, jax.random.key(0), recipe)
    keys = jax.random.split(jax.random.key(5), 3)
    batch = draw_batch(views, prompts, keys[0], keys[1], 64)
    loss = jax.jit(lambda trainable: e4t_loss(domain.method, trainable, domain.frozen, batch, keys[2], regularisation=0.0)[0])
    before = loss(start(domain.method, domain.frozen, scope, keys[0]))
    assert loss(tuned) < 0.99 * before


def test_more_pictures_than_one_call_takes_are_tuned_in_several(domain, tmp_path, monkeypatch):
    """Five in calls of two: each under its own name, as if alone."""
    monkeypatch.setattr(domain_module, "CONCEPTS_PER_CALL", 2)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for index, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    concepts = domain.tune(paths, steps=1)
    assert [concept.name for concept in concepts] == ["0", "1", "2", "3", "4"]
    (alone,) = domain.tune(paths[4:], steps=1)
    np.testing.assert_allclose(concepts[4].folded, alone.folded, atol=1e-5)
    drawn = domain.generate(concepts, ["*s"], steps=2)
    np.testing.assert_allclose(drawn[4:].astype(int), domain.generate(concepts[4:], ["*s"], steps=2), atol=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "file"}, "mask: venus has none"),
        ({"caption": "a photo"}, "lacks the placeholder"),
        ({"caption": ["*s", "a photo of *s"]}, "there are 2 for 1 pictures"),
        ({"steps": -1}, "steps: -1"),
    ],
)
def test_wrong_options_are_refused(domain, tmp_path, options, said):
    Image.new("RGB", (16, 16)).save(tmp_path / "venus.png")
    with pytest.raises(UserError, match=said):
        domain.tune([tmp_path / "venus.png"], **options)


def test_an_unknown_mask_is_refused(domain, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "venus.png")
    settings = TuneSettings()
    object.__setattr__(settings, "mask", "soft")  # past what checks signatures in tests, and nowhere else
    with pytest.raises(UserError, match="mask: 'soft'"):
        domain.tune([tmp_path / "venus.png"], settings)
