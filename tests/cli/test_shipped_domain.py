"""`e4t evaluate`, `e4t demo` and a trial on the domain that comes along."""

import json

import numpy as np
import pytest
from concept_numbers import numbers
from PIL import Image


def check_measured(folder):
    """Every key of the contract, pictures and concept files; a share is a share. Returns the metrics."""
    metrics = json.loads((folder / "metrics.json").read_text())
    keys = {"identity_top1", "identity_similarity", "context_top1", "style_top1", "text_similarity", "image_similarity"}
    keys |= {"seconds_per_concept", "bytes_per_concept", "judge_identity_top1", "judge_context_top1"}
    keys |= {"attributes", "attributes_mean", "sharpness"}
    assert keys <= set(metrics)
    assert all(0 <= value <= 1 for key, value in metrics.items() if key.endswith("_top1"))
    assert metrics["judge_identity_top1"] >= 0.95 and metrics["judge_context_top1"] >= 0.95
    assert len(list((folder / "concepts").glob("*.safetensors"))) == 2
    # What was tuned on is a bare picture.
    assert len(list((folder / "given").iterdir())) == 2
    with Image.open(folder / "grid.png") as grid:
        assert min(grid.size) > 3 * 64
    return metrics


@pytest.mark.compiles
def test_evaluate_writes_what_it_promises(tmp_path):
    """On bare photos, then on pictures in any style; with a report."""
    from e4t_jax.cli import evaluate
    from e4t_jax.tuning.tune import TuneSettings

    evaluate.main(evaluate.Config(tmp_path, concepts=2, sampling_steps=2, tuning=TuneSettings(steps=1)))
    metrics = check_measured(tmp_path)
    assert metrics["settings"]["given"] == "picture" and "identity_top1" in metrics["any_style"]
    assert "attributes.ears" in (tmp_path / "report.md").read_text()


@pytest.mark.compiles
def test_demo_writes_what_it_promises(tmp_path):
    from e4t_jax.cli import demo

    demo.main(demo.Config(tmp_path, concepts=2, steps=1, sampling_steps=2))
    assert check_measured(tmp_path)["prompts"]


@pytest.mark.compiles
def test_a_trial_tunes_as_the_command_line_does(tmp_path):
    """The same picture by `e4t tune` with its defaults gives the same concept file, byte by byte."""
    from e4t_jax.cli import tune
    from e4t_jax.creatures.judging.personalisation_trial import held_out, tune_trial
    from e4t_jax.files.domain_files import load_domain

    tune_trial(load_domain("creatures"), held_out(0, 1, split="validation"), tmp_path / "trial")
    name = "validation_0_000"
    tune.main(tune.Config((tmp_path / "trial" / "given" / f"{name}.png",), tmp_path / "cli"))
    written = [folder / f"{name}.safetensors" for folder in (tmp_path / "trial" / "concepts", tmp_path / "cli")]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.slow
def test_concept_in_a_batch_equals_the_concept_alone(tmp_path):
    """With the domain's own settings, from bare files: maximum difference 1e-5 in every trained number."""
    from e4t_jax.creatures.judging.personalisation_trial import held_out, write_pictures
    from e4t_jax.files.domain_files import load_domain

    creatures = load_domain("creatures")
    paths = write_pictures(held_out(0, 3, split="validation"), tmp_path, "picture")
    for path, together in zip(paths, creatures.tune(paths), strict=True):
        (alone,) = creatures.tune([path])
        assert np.abs(together.trainable.residual).max() > 1e-2
        np.testing.assert_allclose(numbers(together), numbers(alone), atol=1e-5)
