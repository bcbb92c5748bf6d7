"""The judges: what they return, and what they learn from, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from e4t_jax.creatures.judging import judge_losses
from e4t_jax.creatures.judging.judge_losses import attribute_labels, identity_loss, label_loss, scene_labels, validate_judges
from e4t_jax.creatures.judging.judges import ATTRIBUTE_HEADS, JUDGES, SCENE_HEADS, flatten_judge, judge, load_judges
from e4t_jax.creatures.judging.personalisation_trial import held_out
from e4t_jax.creatures.world.attributes import hue_word, sample_identities, sample_scenes, take
from e4t_jax.creatures.world.renderer import render
from e4t_jax.errors import UserError

pytestmark = pytest.mark.compiles

SIZE = 32


@pytest.fixture(scope="module")
def judges():
    """All judges with random weights."""
    blank = jnp.zeros((1, SIZE, SIZE, 3))
    return {name: jax.jit(module.init)(jax.random.key(0), blank)["params"] for name, module in JUDGES.items()}


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
    monkeypatch.setattr(judge_losses, "JUDGES", dict.fromkeys(JUDGES, _Verdict()))
    monkeypatch.setattr(judge_losses, "degrade", lambda images, key, strength=1.0: images)


def test_identity_verdicts_are_unit_vectors_of_each_picture(judges, pictures):
    """Five pictures in chunks of two: the padding leaves no trace."""
    vectors = judge("identity", judges["identity"], pictures, chunk=2)
    assert vectors.shape == (5, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-4)
    alone = judge("identity", judges["identity"], pictures[4:], chunk=2)
    np.testing.assert_allclose(vectors[4:], alone, atol=1e-5)


@pytest.mark.parametrize(("name", "heads"), [("scene", SCENE_HEADS), ("attributes", ATTRIBUTE_HEADS)])
def test_verdicts_have_every_head(judges, pictures, name, heads):
    logits = judge(name, judges[name], pictures, chunk=2)
    assert {head: value.shape for head, value in logits.items()} == {head: (5, count) for head, count in heads.items()}


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
    loss, _ = identity_loss("identity", {}, None, (jnp.asarray(vectors, jnp.float32), jnp.asarray(who)), jax.random.key(0))
    np.testing.assert_allclose(loss, total / 7, rtol=1e-5)


def test_label_loss_is_the_sum_of_cross_entropies_where_there_is_a_label(losses_of_verdicts):
    generator = np.random.default_rng(2)
    logits = {name: generator.normal(size=(4, count)) for name, count in ATTRIBUTE_HEADS.items()}
    labels = {name: generator.integers(0, count, 4) for name, count in ATTRIBUTE_HEADS.items()}
    labels["trim"][1] = -1
    total = 0.0
    for name, values in logits.items():
        log_share = values - np.log(np.exp(values).sum(-1, keepdims=True))
        total -= sum(log_share[row, label] for row, label in enumerate(labels[name]) if label >= 0) / 4
    batch = jax.tree.map(jnp.float32, logits), jax.tree.map(jnp.asarray, labels)
    loss, _ = label_loss("attributes", {}, None, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_labels_are_those_of_the_records():
    identities, scenes = sample_identities(0, 64), sample_scenes(0, 64)
    where, what = scene_labels(scenes), attribute_labels(identities)
    assert set(where) == set(SCENE_HEADS) and set(what) == set(ATTRIBUTE_HEADS)
    np.testing.assert_array_equal(where["context"], scenes["context"])
    np.testing.assert_array_equal(what["hue"], hue_word(identities["body_hue"]))
    np.testing.assert_array_equal(what["ears"], identities["ears"])
    for name, count in {**SCENE_HEADS, **ATTRIBUTE_HEADS}.items():
        assert {**where, **what}[name].max() < count


def test_trim_has_no_label_where_no_picture_can_show_it():
    """But for the tip of a tail and a bow or a hat's band, two trims of a creature without a label give the same picture.

    Plain, without ears that show it, without a scarf: 1/5 · 1/3 · 4/5 of all, here within three standard deviations.
    """
    identities = sample_identities(1, 256)
    hidden = attribute_labels(identities)["trim"] < 0
    assert 0.01 < hidden.mean() < 0.1
    plain = {**take(identities, hidden), "tail": np.zeros(hidden.sum()), "hat": np.zeros(hidden.sum())}
    scenes = sample_scenes(1, int(hidden.sum()))
    other = {**plain, "trim_hue": (plain["trim_hue"] + 0.4) % 1.0}
    first, second = (render(record, scenes)[0].astype(int) for record in (plain, other))
    assert np.abs(first - second).max() == 0


def test_shipped_judges_are_right_on_true_renders():
    """Validation identities: 0.95 for identity, context, style and every attribute."""
    figures = validate_judges(load_judges(), seed=1, split="validation")
    assert min(figures.values()) >= 0.95, figures


def test_fish_are_told_apart_by_their_own_judge():
    """Validation identities: 0.95 for identity, context and style; of attributes, that judge knows the creatures' alone."""
    figures = validate_judges(load_judges(), seed=1, split="validation", kind="fish")
    assert set(figures) == {"judge_identity_top1", "judge_context_top1", "judge_style_top1"}
    assert min(figures.values()) >= 0.95, figures


def test_a_class_without_a_judge_is_refused():
    with pytest.raises(UserError, match="one tree from another; only of creature, fish"):
        held_out(0, 2, kind="tree")
