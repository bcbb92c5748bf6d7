"""The files of a run that other programs read."""

import dataclasses
import itertools
import json
import time
from importlib import metadata

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from e4t_jax import registry
from e4t_jax.cli import pretrain
from e4t_jax.creatures.presets import creatures
from e4t_jax.creatures.world import dataset
from e4t_jax.pretraining import run_log as watching
from e4t_jax.pretraining.run_log import RunLog
from e4t_jax.training import flops as speed


def read_events(folder):
    """All that TensorBoard's own reader finds."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_from_a_checkout_that_is_not_installed_is_watched_too(tmp_path, monkeypatch):
    """`PYTHONPATH=checkout python -m train.pretrain`: the package has no version then, the libraries have theirs."""
    true = metadata.version

    def version(name):
        if name == "e4t-jax":
            raise metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(watching.metadata, "version", version)
    watch = RunLog(tmp_path, 4, 10, {"seed": 3})
    watch.record(5, {"loss": 0.5})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"] == {"seed": 3}
    assert run["versions"]["e4t-jax"] == "not installed" and run["versions"]["jax"] == true("jax")
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["loss"]) == (5, 0.5)


def test_speed_is_of_the_steps_alone(tmp_path, monkeypatch):
    """Ten steps of 4 pictures and 3 TFLOP in 20 seconds, on a chip of 197 TFLOP/s; drawing samples takes another 1,000."""
    clock = itertools.chain([100.0, 110.0, 1110.0, 1130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    watch = RunLog(tmp_path, 4, 40, {})
    watch.peak = speed.peak_of("TPU v5 lite")
    assert "images_per_second" not in watch.record(10, {"loss": 1.0}, 3.0)
    watch.look(10, lambda: (np.zeros((4, 6, 3), np.uint8), {}))
    line = watch.record(20, {"loss": 1.0}, 3.0)
    assert line["seconds_per_step"] == pytest.approx(3.0) and line["images_per_second"] == pytest.approx(4 / 3)
    assert line["seconds_left"] == pytest.approx(60) and line["tflops_per_device"] == pytest.approx(1)
    assert line["share_of_peak"] == pytest.approx(1 / 197)


def test_what_a_device_can_at_most():
    assert speed.peak_of("TPU v5") == 459 and speed.peak_of("NVIDIA A100-SXM4-80GB") == 312
    assert speed.peak_of("NVIDIA L40S") == 362 and speed.peak_of("NVIDIA H100 80GB HBM3") == 989.4
    assert speed.peak_of("cpu") is None


def test_tensorboard_shows_a_run_that_went_on(tmp_path):
    """Steps 2, 4 and 6, then on from 3: what the first run told from 4 on is void, as in metrics.jsonl."""
    first = RunLog(tmp_path, 4, 10, {})
    for step in (2, 4, 6):
        first.record(step, {"loss": float(step)})
        first.look(step, lambda step=step: (np.full((4, 6, 3), step, np.uint8), {"likeness": step / 10}))
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which have the second they began in
    again = RunLog(tmp_path, 4, 10, {})
    again.record(4, {"loss": 40.0})
    events = read_events(tmp_path / "tensorboard")
    assert scalars(events, "loss") == [(2, 2.0), (4, 40.0)]
    assert [step for step, _ in scalars(events, "likeness")] == [2]
    assert [(picture.step, picture.width, picture.height) for picture in events.Images("samples")] == [(2, 6, 4)]
    assert np.asarray(Image.open(tmp_path / "samples" / "000006.png")).max() == 6


def few_creatures(data_dir):
    """The drawn world's training split, of sixteen pictures."""
    return dataset.as_source("train", data_dir, dataset.CreaturesConfig(train=16, validation=1, test=1))


@pytest.mark.slow
def test_a_run_of_the_embedded_world_is_watched_from_tensorboard(tmp_path, monkeypatch):
    """Six steps on sixteen creatures: scalars, likeness to validation identities, grids every three steps, and a trace."""
    monkeypatch.setitem(registry._ENTRIES["data"], "creatures", f"{__name__}:few_creatures")
    preset = creatures()
    settings = dataclasses.replace(preset.training, steps=6, batch_size=4, watch_every=2, sample_every=3)
    work = tmp_path / "work"
    pretrain.main(pretrain.Config(tmp_path / "domain", work=work, profile=True, domain=preset.domain, training=settings))
    events = read_events(work / "tensorboard")
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert scalars(events, "loss") == losses and [step for step, _ in losses] == [2, 4, 6]
    assert [step for step, _ in scalars(events, "tflops_per_device")] == [4, 6]
    assert all(value > 0 for _, value in scalars(events, "images_per_second"))
    for name in ("identity_similarity", "identity_top1", "context_top1"):
        likeness = scalars(events, f"validation_{name}")
        assert [step for step, _ in likeness] == [3, 6] and all(-1 <= value <= 1 for _, value in likeness)
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [3, 6] and grids[0].encoded_image_string != grids[1].encoded_image_string
    grid = np.asarray(Image.open(work / "samples" / "000006.png"))
    assert grid.shape == (8 * (64 + 4) + 4, 3 * (64 + 4) + 4, 3) and grid.std() > 20
    assert len(list((work / "tensorboard").rglob("*.xplane.pb"))) == 1
