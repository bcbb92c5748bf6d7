"""`e4t pretrain`, `e4t train-base` and `e4t train-judges`, a few steps each: what they write is read back."""

import dataclasses
import io
import itertools
import json
from functools import partial

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.compiles
def test_pretrain_writes_a_domain_and_resumes(domain, tmp_path, monkeypatch):
    """Main path on a folder of pictures: written, read back; a run stopped halfway ends where an unbroken one does."""
    from e4t_jax import bases
    from e4t_jax.cli import pretrain
    from e4t_jax.files.domain_files import load_domain
    from e4t_jax.pretraining import pretrain as pretraining
    from e4t_jax.pretraining.settings import DomainSettings
    from e4t_jax.pretraining.step import PretrainSettings

    bases.save_folder(tmp_path / "base", domain.base, domain.params)
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    common = {"base": str(tmp_path / "base"), "data": f"folder:{tmp_path / 'pictures'}"}
    common["domain"] = DomainSettings("creature")
    settings = partial(PretrainSettings, steps=4, batch_size=2)
    for name in ("jit", "pmap"):
        pretrain.main(pretrain.Config(tmp_path / name, work=tmp_path / f"work_{name}", training=settings(parallel=name), **common))
    written = load_domain(tmp_path / "jit")
    assert written.domain_token == "creature" and written.template == "neutral"
    assert (tmp_path / "jit" / "encoder.safetensors").read_bytes() != (tmp_path / "pmap" / "encoder.safetensors").read_bytes()

    whole = pretraining.training_batches

    def stop_after_three(*arguments, **options):
        rows = whole(*arguments, **options)
        if options["first"] == 3:  # the look at the data before anything is compiled
            yield from rows
        yield from itertools.islice(rows, 3)
        raise KeyboardInterrupt

    stopped = pretrain.Config(tmp_path / "again", work=tmp_path / "work_again", training=settings(checkpoint_every=2), **common)
    monkeypatch.setattr(pretraining, "training_batches", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(stopped)
    assert not (tmp_path / "again" / "domain.json").exists()
    monkeypatch.setattr(pretraining, "training_batches", whole)
    pretrain.main(dataclasses.replace(stopped, resume=True))
    assert (tmp_path / "again" / "encoder.safetensors").read_bytes() == (tmp_path / "jit" / "encoder.safetensors").read_bytes()


@pytest.mark.compiles
def test_a_twentieth_of_a_folder_may_be_broken(domain, tmp_path, capsys):
    """The run completes, says what it skipped once and how many at the end; its losses do not depend on the number of workers.

    Four pictures are held out: the loss on them, and samples of them, are looked at in one of the runs."""
    from e4t_jax import bases
    from e4t_jax.cli import pretrain
    from e4t_jax.pretraining.settings import DomainSettings
    from e4t_jax.pretraining.step import PretrainSettings

    bases.save_folder(tmp_path / "base", domain.base, domain.params)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index:02}.png")
    (pictures / "07.png").write_bytes((pictures / "07.png").read_bytes()[:100])
    lines = []
    for workers in (0, 2):
        settings = PretrainSettings(
            steps=10, batch_size=2, watch_every=1, sample_every=10 if not workers else 0, held_out=4, workers=workers
        )
        common = {"base": str(tmp_path / "base"), "data": f"folder:{pictures}", "domain": DomainSettings("creature")}
        work = tmp_path / f"work_{workers}"
        pretrain.main(pretrain.Config(tmp_path / f"out_{workers}", work=work, training=settings, **common))
        said = capsys.readouterr().err
        assert said.count("07.png") == 1 and "1 of the 16 pictures" in said
        lines.append([json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()])
    assert set(lines[0].pop()) == {"step", "validation_loss", "time"}
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]] and len(lines[0]) == 10
    counts = [[line["broken_pictures"] for line in one] for one in lines]
    assert counts[0] == counts[1] and counts[0][-1] == 1
    events = EventAccumulator(str(tmp_path / "work_0" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [pytest.approx(line["loss"]) for line in lines[0]]
    assert [event.value for event in events.Scalars("broken_pictures")] == counts[0]
    assert [event.step for event in events.Scalars("validation_loss")] == [10]
    grid = np.asarray(Image.open(io.BytesIO(events.Images("samples")[0].encoded_image_string)))
    assert grid.shape == (4 * (16 + 4) + 4, 4 * (16 + 4) + 4, 3) and events.Images("samples")[0].step == 10
    first = np.asarray(Image.open(pictures / "00.png"))  # of every row, the picture given, before the three that are drawn
    np.testing.assert_array_equal(grid[4:20, 4:20], first)
    assert not (tmp_path / "work_2" / "samples").exists()


@pytest.mark.slow
def test_base_is_trained_and_written(tmp_path):
    """All stages for two steps each, one on one device of two; the folder is read back, a finished run has nothing to do."""
    from e4t_jax import bases
    from e4t_jax.cli import base
    from e4t_jax.creatures.learning.base_stages import BaseSettings

    steps = {"autoencoder_steps": 2, "denoiser_steps": 2, "contrast_steps": 2}
    batches = {"autoencoder_batch": 3, "batch_size": 4, "contrast_batch": 4}
    config = base.Config(tmp_path / "base", work=tmp_path / "work", training=BaseSettings(pictures=64, **batches, **steps))
    base.main(config)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "base").rglob("*.safetensors")}
    loaded, params = bases.load_folder(tmp_path / "base")
    assert set(params) == {"vae", "unet", "text_encoder", "image_encoder"}
    assert loaded.scaling_factor != 1.0
    base.main(config)
    assert written == {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "base").rglob("*.safetensors")}


@pytest.mark.compiles
def test_judges_are_trained_and_written(tmp_path):
    from e4t_jax.cli import judges
    from e4t_jax.creatures.judging.judge_stages import JudgeSettings
    from e4t_jax.creatures.judging.judges import load_judges

    steps = {"identity_steps": 2, "scene_steps": 2, "attribute_steps": 2}
    judges.main(judges.Config(tmp_path, training=JudgeSettings(identities=64, scenes=256, creatures=256, **steps)))
    assert set(load_judges(tmp_path)) == {"identity", "scene", "attributes", "fish"}
