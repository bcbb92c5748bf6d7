"""The demo's figures: each with its standard error, and the change that tuning makes, picture by picture."""

import numpy as np
import pytest

from e4t_jax.creatures.judging.demonstration import change, identity_line
from e4t_jax.creatures.judging.judges import judge, load_judges
from e4t_jax.creatures.judging.personalisation_trial import Recognised, held_out, recognise
from e4t_jax.evaluation.metrics import standard_error


def test_the_bootstrap_is_over_concepts():
    """Of their means' spread, to 3 per cent, though the pictures of one concept are alike; of alike concepts, none."""
    generator = np.random.default_rng(0)
    values = np.repeat(generator.standard_normal((40, 1)), 6, axis=1) + 0.1 * generator.standard_normal((40, 6))
    expected = values.mean(axis=1).std() / np.sqrt(40)
    np.testing.assert_allclose(standard_error(values), expected, rtol=0.03)
    assert expected > 2 * values.std() / np.sqrt(values.size)
    assert standard_error(np.ones((5, 4))) == 0


def test_the_change_is_measured_picture_by_picture():
    """Two figures that move together differ by less than either is known to."""
    generator = np.random.default_rng(0)
    similarity = np.repeat(generator.uniform(0.2, 0.9, (30, 1)), 4, axis=1)
    right = similarity > 0.5
    after = right.copy()
    after[0, 0] = not right[0, 0]
    moved = change(Recognised(right, similarity), Recognised(after, similarity + 0.01))
    np.testing.assert_allclose(moved["identity_similarity"], 0.01)
    np.testing.assert_allclose(abs(moved["identity_top1"]), 1 / 120)
    assert moved["standard_errors"]["identity_top1"] < standard_error(right) / 5
    assert moved["standard_errors"]["identity_similarity"] < 1e-9


def test_the_line_names_both_figures_their_difference_and_the_noise_of_each():
    def figures(top1, error):
        return {"identity_top1": top1, "standard_errors": {"identity_top1": error}}

    metrics = {**figures(0.875, 0.061), "zero_steps": figures(0.8333, 0.07), "change": figures(0.0417, 0.05)}
    assert identity_line(metrics, 5, 24) == (
        "Identity found again among 64, 24 pictures, ± a standard error: "
        "0 steps 0.833 ± 0.070, 5 steps 0.875 ± 0.061, difference +0.042 ± 0.050"
    )


@pytest.mark.compiles
def test_true_pictures_are_recognised_each_beside_its_own_identity():
    """The cosine with the mean of the gallery's pictures of that identity; another creature's pictures are not recognised."""
    from e4t_jax.creatures.judging.judge_losses import identity_prototypes
    from e4t_jax.creatures.world.pictures import as_floats

    judges, trial = load_judges(), held_out(3, 8, 3)
    found = recognise(judges, trial, trial.truth)
    assert found.right.shape == (8, 3) and found.right.mean() >= 0.95
    prototypes = np.asarray(identity_prototypes(judges, 3, 64, split="test", kind="creature"))
    for row, prompt in ((0, 0), (5, 2)):
        seen = np.asarray(judge("identity", judges["identity"], as_floats(trial.truth[row, prompt][None])))[0]
        np.testing.assert_allclose(found.similarity[row, prompt], seen @ prototypes[row], atol=1e-4)
    assert recognise(judges, trial, np.roll(trial.truth, 1, axis=0)).right.mean() <= 0.1
