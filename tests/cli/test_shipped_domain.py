"""`infer.evaluate`, `infer.demo` and a trial on the domain that comes along."""

import json

import pytest
from PIL import Image

OPTIMISED = True  # the shipped domain computes for long


@pytest.mark.compiles
def test_evaluate_and_demo_write_what_they_promise(tmp_path):
    """On the shipped domain: every key of the contract, a report, pictures and concept files; a share is a share."""
    from e4t_jax.cli import demo, evaluate
    from e4t_jax.training.tune import TuneSettings

    evaluate.main(evaluate.Config(tmp_path / "evaluate", concepts=2, sampling_steps=2, tuning=TuneSettings(steps=1)))
    demo.main(demo.Config(tmp_path / "demo", concepts=2, steps=1, sampling_steps=2))
    keys = {"identity_top1", "identity_similarity", "context_top1", "style_top1", "text_similarity", "image_similarity"}
    keys |= {"seconds_per_concept", "bytes_per_concept", "judge_identity_top1", "judge_context_top1"}
    keys |= {"attributes", "attributes_mean", "sharpness"}
    for folder in (tmp_path / "evaluate", tmp_path / "demo"):
        metrics = json.loads((folder / "metrics.json").read_text())
        assert keys <= set(metrics)
        assert all(0 <= value <= 1 for key, value in metrics.items() if key.endswith("_top1"))
        assert metrics["judge_identity_top1"] >= 0.95 and metrics["judge_context_top1"] >= 0.95
        assert len(list((folder / "concepts").glob("*.safetensors"))) == 2
        # What was tuned on is a bare picture.
        assert len(list((folder / "given").iterdir())) == 2
        with Image.open(folder / "grid.png") as grid:
            assert min(grid.size) > 3 * 64
    assert metrics["prompts"]
    assert "attributes.ears" in (tmp_path / "evaluate" / "report.md").read_text()
    metrics = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())
    assert metrics["settings"]["given"] == "picture" and "identity_top1" in metrics["any_style"]


@pytest.mark.compiles
def test_a_trial_tunes_as_the_command_line_does(tmp_path):
    """The same picture by `train.tune` with its defaults gives the same concept file, byte by byte."""
    from e4t_jax.cli import tune
    from e4t_jax.creatures.trial import held_out, personalise
    from e4t_jax.domain_files import load_domain

    personalise(load_domain("creatures"), held_out(0, 1, split="validation"), tmp_path / "trial")
    name = "validation_0_000"
    tune.main(tune.Config((tmp_path / "trial" / "given" / f"{name}.png",), tmp_path / "cli"))
    written = [folder / f"{name}.safetensors" for folder in (tmp_path / "trial" / "concepts", tmp_path / "cli")]
    assert written[0].read_bytes() == written[1].read_bytes()
