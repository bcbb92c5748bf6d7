"""Pictures unlike all that a domain was pretrained on are told, and its own are not."""

import dataclasses
import warnings

import grain.python as grain
import jax
import numpy as np
import pytest

from e4t_jax.errors import UserError
from e4t_jax.files.domain_files import load_domain, save_domain
from e4t_jax.files.resumable import tune_to_files
from e4t_jax.pretraining.familiar import familiarity_of
from e4t_jax.testing import tiny_base, write_tiny_world
from e4t_jax.tuning.familiarity import LEAST, Familiarity, distance, learn_familiarity
from e4t_jax.tuning.tune import TuneSettings


def gaussians(seed, count, size=24):
    """Of a covariance that is far from round."""
    spread = np.random.default_rng(0).standard_normal((size, size)) * np.geomspace(0.1, 3, size)
    return (np.random.default_rng(seed).standard_normal((count, size)) @ spread + 5).astype(np.float32)


def test_the_distance_is_mahalanobis_of_one_half_and_the_other_sets_the_limit():
    """Against a solve in float64, to a relative 1e-3; 400 of the same kind are within, 400 moved by one deviation each are not."""
    rows = gaussians(1, 2000)
    known = learn_familiarity(rows)
    half = np.float64(rows[::2])
    covariance = np.cov(half, rowvar=False)
    covariance += 1e-4 * np.trace(covariance) / 24 * np.eye(24)
    for one in gaussians(2, 20):
        apart = one - half.mean(axis=0)
        np.testing.assert_allclose(distance(known, one), np.sqrt(apart @ np.linalg.solve(covariance, apart) / 24), rtol=1e-3)
    farthest = max(float(distance(known, one)) for one in rows[1::2])
    np.testing.assert_allclose(known.limit, 1.1 * farthest, rtol=1e-6)
    measure = jax.vmap(lambda one: distance(known, one))
    assert np.all(measure(gaussians(3, 400)) <= known.limit)
    moved = gaussians(4, 400) + 3 * np.random.default_rng(5).choice([-1, 1], (400, 24)).astype(np.float32)
    assert np.mean(measure(moved) > known.limit) > 0.99


def test_of_few_pictures_nothing_is_said():
    assert learn_familiarity(gaussians(0, LEAST - 1)) is None and learn_familiarity(gaussians(0, LEAST)) is not None


def anything(size, limit):
    return Familiarity(np.zeros(size, np.float32), np.eye(size, dtype=np.float32), np.asarray(limit, np.float32))


@pytest.mark.compiles
def test_it_is_learned_of_pictures_spread_over_the_data():
    """What CLIP sees in every second of 600 rows is not another thing than the same pictures given alone."""
    base, params = tiny_base()
    pictures = np.random.default_rng(0).uniform(-1, 1, (600, 16, 16, 3)).astype(np.float32)
    rows = grain.MapDataset.source([{"image": picture} for picture in pictures])
    known = familiarity_of(base, params["image_encoder"], rows)
    embeddings = np.asarray(jax.jit(base.image_encoder.embed)(params["image_encoder"], pictures[:576]))
    expected = learn_familiarity(embeddings)
    np.testing.assert_allclose(known.mean, expected.mean, atol=1e-4 * np.abs(expected.mean).max())
    np.testing.assert_allclose(known.limit, expected.limit, rtol=0.02)
    assert familiarity_of(base, params["image_encoder"], rows[: LEAST - 1]) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


def test_a_domain_keeps_it_and_one_that_another_domain_left_is_passed_over(world, tmp_path):
    domain = load_domain(world.domain)
    assert domain.familiarity is None
    save_domain(tmp_path / "d", dataclasses.replace(domain, familiarity=anything(8, 2.5)))
    read = load_domain(tmp_path / "d")
    assert float(read.familiarity.limit) == 2.5 and np.array_equal(read.familiarity.precision, np.eye(8))
    assert read.fingerprint == domain.fingerprint
    other = dataclasses.replace(domain, encoder=jax.tree.map(lambda leaf: leaf + 1, domain.encoder))
    save_domain(tmp_path / "d", other)
    assert load_domain(tmp_path / "d").familiarity is None
    save_domain(tmp_path / "d", dataclasses.replace(domain, familiarity=anything(8, 2.5)))
    file = tmp_path / "d" / "familiarity.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"familiarity\.safetensors is damaged"):
        load_domain(tmp_path / "d")
    with pytest.raises(UserError, match=r"familiarity\.safetensors is a file of the domain itself"):
        save_domain(tmp_path / "e", domain, beside={"familiarity.safetensors": b""})


@pytest.mark.compiles
def test_tuning_says_which_pictures_are_unlike_the_domains_own(domain, world, tmp_path):
    pictures = sorted(world.pictures.iterdir())[:2]
    strange, plain = (dataclasses.replace(domain, familiarity=anything(8, limit)) for limit in (0, 1e9))
    line = "0 and 1 more are unlike every picture that this domain was pretrained on: it will draw a creature instead of what"
    with pytest.warns(UserWarning, match=f"^{line} is shown"):
        concepts = strange.tune(pictures, steps=0)
    assert [concept.tuning["familiar"] for concept in concepts] == [False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [concept.tuning["familiar"] for concept in plain.tune(pictures, steps=0)] == [True, True]
        assert "familiar" not in domain.tune(pictures[:1], steps=0)[0].tuning
    for resume in (False, True):
        tuned = tune_to_files(strange, pictures[:1], tmp_path, TuneSettings(steps=0), resume=resume)
        assert tuned.unfamiliar.startswith("0 is unlike every picture that this domain was pretrained on")
    assert tune_to_files(plain, pictures[:1], tmp_path, TuneSettings(steps=0)).unfamiliar == ""


@pytest.mark.compiles
def test_the_shipped_domain_knows_creatures_from_fish_and_from_noise():
    """48 held-out creatures in any style, fish, houses and trees, and plain noise: all told apart."""
    from e4t_jax.creatures.world.attributes import of_class, sample_identities, sample_scenes
    from e4t_jax.creatures.world.renderer import render

    domain = load_domain("creatures")
    sets = {"noise": np.random.default_rng(0).uniform(-1, 1, (48, 32, 32, 3)).astype(np.float32)}
    for kind in ("creature", "fish", "house", "tree"):
        identities, scenes = sample_identities(9, 48, split="test"), sample_scenes(9, 48, split="test", **of_class(kind))
        sets[kind] = render(identities, scenes)[0].astype(np.float32) / 127.5 - 1
    embed = jax.jit(lambda images: domain.base.image_encoder.embed(domain.params["image_encoder"], images))
    measure = jax.jit(jax.vmap(lambda one: distance(domain.familiarity, one)))
    beyond = {name: np.mean(measure(embed(images)) > domain.familiarity.limit) for name, images in sets.items()}
    assert beyond == {"creature": 0, "fish": 1, "house": 1, "tree": 1, "noise": 1}
