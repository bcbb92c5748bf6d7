"""The judges: what they return, and what they learn from, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from e4t_jax.evaluation import judge_training
from e4t_jax.evaluation.judge_training import identity_loss, scene_labels, scene_loss
from e4t_jax.evaluation.judges import HEADS, IdentityJudge, SceneJudge, flatten_judge, judge, load_judges
from e4t_jax.world.attributes import hue_word, sample_identities, sample_scenes

SIZE = 32


@pytest.fixture(scope="module")
def judges():
    """Both judges with random weights."""
    blank = jnp.zeros((1, SIZE, SIZE, 3))
    modules = {"identity": IdentityJudge(), "scene": SceneJudge()}
    return {name: jax.jit(module.init)(jax.random.key(0), blank)["params"] for name, module in modules.items()}


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).uniform(-1, 1, (5, SIZE, SIZE, 3)).astype(np.float32)


class _Verdict:
    """A judge whose verdict is its input."""

    def apply(self, variables, images):
        return images


@pytest.fixture
def losses_of_verdicts(monkeypatch):
    """Losses that take verdicts where they would take pictures."""
    monkeypatch.setattr(judge_training, "IdentityJudge", _Verdict)
    monkeypatch.setattr(judge_training, "SceneJudge", _Verdict)
    monkeypatch.setattr(judge_training, "degrade", lambda images, key: images)


def test_identity_verdicts_are_unit_vectors_of_each_picture(judges, pictures):
    """Five pictures in chunks of two: the padding leaves no trace."""
    vectors = judge("identity", judges["identity"], pictures, chunk=2)
    assert vectors.shape == (5, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-4)
    alone = judge("identity", judges["identity"], pictures[4:], chunk=2)
    np.testing.assert_allclose(vectors[4:], alone, atol=1e-5)


def test_scene_verdicts_have_every_head(judges, pictures):
    logits = judge("scene", judges["scene"], pictures, chunk=2)
    assert {name: value.shape for name, value in logits.items()} == {name: (5, count) for name, count in HEADS.items()}


def test_judges_are_read_as_written(judges, tmp_path):
    for name, params in judges.items():
        save_file(flatten_judge(params), tmp_path / f"{name}.safetensors")
    read = load_judges(tmp_path)
    assert jax.tree.structure(read) == jax.tree.structure(judges)
    # Stored as float16: eleven bits of mantissa, and a finest step of 2^-24.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-24), read, judges)


def test_identity_loss_is_the_supervised_contrastive_loss(losses_of_verdicts):
    """Eq. 2 of arXiv 2004.11362 in float64, sum by sum; the lone picture has no positives and counts 0."""
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(7, 5))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    who = np.array([0, 0, 0, 1, 1, 2, 1])
    total = 0.0
    for i in range(7):
        others = [a for a in range(7) if a != i]
        positives = [p for p in others if who[p] == who[i]]
        denominator = sum(np.exp(vectors[i] @ vectors[a] / 0.07) for a in others)
        for p in positives:
            total -= np.log(np.exp(vectors[i] @ vectors[p] / 0.07) / denominator) / len(positives)
    loss = identity_loss({}, jnp.asarray(vectors, jnp.float32), jnp.asarray(who), jax.random.key(0))
    np.testing.assert_allclose(loss, total / 7, rtol=1e-5)


def test_scene_loss_is_the_sum_of_cross_entropies_where_there_is_a_label(losses_of_verdicts):
    generator = np.random.default_rng(2)
    logits = {name: generator.normal(size=(4, count)) for name, count in HEADS.items()}
    labels = {name: generator.integers(0, count, 4) for name, count in HEADS.items()}
    labels["hue"][1] = labels["eyes"][1] = -1
    total = 0.0
    for name, values in logits.items():
        log_share = values - np.log(np.exp(values).sum(-1, keepdims=True))
        total -= sum(log_share[row, label] for row, label in enumerate(labels[name]) if label >= 0) / 4
    loss = scene_loss({}, jax.tree.map(jnp.float32, logits), jax.tree.map(jnp.asarray, labels), jax.random.key(0))
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_only_creatures_have_hue_and_eyes():
    identities, scenes = sample_identities(0, 8), sample_scenes(0, 8, **{"class": np.arange(8) % 4})
    labels = scene_labels(identities, scenes)
    creature = np.arange(8) % 4 == 0
    assert set(labels) == set(HEADS)
    assert (labels["hue"][~creature] == -1).all() and (labels["eyes"][~creature] == -1).all()
    assert (labels["hue"][creature] == hue_word(identities["body_hue"])[creature]).all()
    for name, count in HEADS.items():
        assert labels[name].max() < count
