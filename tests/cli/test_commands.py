"""The command lines: every script explains itself, and a user's mistake is one line and a non-zero exit."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from e4t_jax.errors import UserError

SCRIPTS = {
    "train.base": "--check",
    "train.judges": "--seed",
    "train.pretrain": "--resume",
    "train.cache": "--views",
    "train.tune": "--images",
    "train.import_reference": "--reference",
    "infer.generate": "--prompts",
    "infer.evaluate": "--concepts",
    "infer.export": "--format",
    "infer.demo": "--seed",
}


def call(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("script", "option"), SCRIPTS.items())
def test_help_explains_every_option(script, option):
    done = call(script, "--help")
    assert done.returncode == 0
    assert "--out" in done.stdout and option in done.stdout


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")])
def test_want_of_memory_names_the_flag_to_lower(monkeypatch, error):
    from e4t_jax.cli import shared

    @dataclasses.dataclass(frozen=True)
    class Config(shared.Command):
        """A script."""

        batch_size: int = 16

    def main(config: Config) -> None:
        raise error

    monkeypatch.setitem(main.__annotations__, "config", Config)
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit, match="out of memory; lower --batch-size"):
        shared.run(main)


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """A tiny domain's files, and pictures."""
    from e4t_jax.testing import write_tiny_world

    return write_tiny_world(tmp_path_factory.mktemp("world"))


def contents(folder, *endings):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in endings}


def tune_into(out, world, pictures, **options):
    from e4t_jax.cli import tune
    from e4t_jax.training.tune import TuneSettings

    tuning, caption = TuneSettings(steps=1), "a photo of *s"  # what compiles soonest
    tune.main(tune.Config(tuple(pictures), out, domain=str(world.domain), tuning=tuning, caption=caption, **options))


def draw_into(out, world, concepts, **options):
    from e4t_jax.cli import generate
    from e4t_jax.sample import SampleSettings

    prompts, drawing = ("a photo of *s", "*s in the snow"), SampleSettings(steps=2)
    generate.main(generate.Config(tuple(concepts), prompts, out, domain=str(world.domain), drawing=drawing, **options))


def test_tune_and_generate_on_a_saved_domain(tiny_world, tmp_path):
    """The main path on a tiny domain, run twice: the same seed gives the same files."""
    pictures = sorted(tiny_world.pictures.iterdir())[:2]
    written = []
    for turn in ("first", "second"):
        out = tmp_path / turn
        tune_into(out / "concepts", tiny_world, pictures)
        draw_into(out / "pictures", tiny_world, [out / "concepts" / f"{path.stem}.safetensors" for path in pictures])
        written.append(contents(out / "concepts", ".safetensors") | contents(out / "pictures", ".png"))
    assert len(written[0]) == 2 + 4 + 1
    assert written[0] == written[1]


def test_what_is_broken_fails_alone_and_resuming_does_the_rest(tiny_world, tmp_path, capsys):
    """Four pictures, two of them broken: the others' concepts are written; mended and resumed, no file is written again."""
    pictures = [tmp_path / f"{index}.png" for index in range(4)]
    whole_pictures = [path.read_bytes() for path in sorted(tiny_world.pictures.iterdir())]
    for path, whole in zip(pictures, whole_pictures, strict=True):
        path.write_bytes(whole)
    for path in pictures[1:3]:
        path.write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="2 of 4 pictures failed"):
        tune_into(out, tiny_world, pictures)
    assert set(contents(out, ".safetensors")) == {"0.safetensors", "3.safetensors"}
    assert set(json.loads((out / "tune.json").read_text())["failed"]) == {"1", "2"}
    assert "1.png is empty" in capsys.readouterr().err
    before = (out / "0.safetensors").stat().st_mtime_ns
    damaged = out / "3.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    pictures[1].write_bytes(whole_pictures[1])
    with pytest.raises(UserError, match=r"2\.png is empty"):
        tune_into(out, tiny_world, pictures, resume=True)
    assert damaged.read_bytes() == whole, "a damaged concept is made again"
    assert before == (out / "0.safetensors").stat().st_mtime_ns
    assert len(json.loads((out / "tune.json").read_text())["bytes_per_concept"]) == 3

    concepts, drawn = sorted(out.glob("*.safetensors")), tmp_path / "drawn"
    damaged.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"3\.safetensors"):
        draw_into(drawn, tiny_world, concepts)
    assert set(contents(drawn, ".png")) == {"0_0.png", "0_1.png", "1_0.png", "1_1.png", "grid.png"}
    damaged.write_bytes(whole)
    before = (drawn / "0_0.png").stat().st_mtime_ns
    draw_into(drawn, tiny_world, concepts, resume=True)
    assert before == (drawn / "0_0.png").stat().st_mtime_ns
    assert len(contents(drawn, ".png")) == 7


def test_processes_share_the_pictures_and_make_the_same_concepts(tiny_world, tmp_path, monkeypatch):
    """Two processes, one after the other here, beside one: the same numbers to a step of float16, each in a file of its own."""
    from e4t_jax.concept import load_concept

    pictures = sorted(tiny_world.pictures.iterdir())
    tune_into(tmp_path / "one", tiny_world, pictures)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        tune_into(tmp_path / "two", tiny_world, pictures)
    assert {path.name for path in (tmp_path / "two").glob("*.json")} == {"tune.json", "tune_1.json"}
    for picture in pictures:
        ones, twos = (load_concept(tmp_path / name / f"{picture.stem}.safetensors") for name in ("one", "two"))
        pairs = zip(jax.tree.leaves((ones.trainable, ones.folded)), jax.tree.leaves((twos.trainable, twos.folded)), strict=True)
        for one, two in pairs:
            np.testing.assert_allclose(one, two, rtol=2e-3, atol=1e-5)  # float16 in the files


def test_pretrain_writes_a_domain_and_resumes(domain, tmp_path, monkeypatch):
    """Main path on a folder of pictures: written, read back; a run stopped halfway ends where an unbroken one does."""
    from e4t_jax import bases, pretraining
    from e4t_jax.cli import pretrain
    from e4t_jax.domain_files import load_domain
    from e4t_jax.training.pretrain import PretrainSettings

    bases.save_folder(tmp_path / "base", domain.base, domain.params)
    (tmp_path / "pictures").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    common = {"base": str(tmp_path / "base"), "data": f"folder:{tmp_path / 'pictures'}"}
    common["domain"] = pretraining.DomainSettings(template="neutral")
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


def test_a_twentieth_of_a_folder_may_be_broken(tiny_world, tmp_path, capsys):
    """The run completes, says what it skipped once and how many at the end; its losses do not depend on the number of workers."""
    from e4t_jax.cli import pretrain
    from e4t_jax.pretraining import DomainSettings
    from e4t_jax.training.pretrain import PretrainSettings

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index:02}.png")
    (pictures / "07.png").write_bytes((pictures / "07.png").read_bytes()[:100])
    lines = []
    for workers in (1, 3):
        settings = PretrainSettings(steps=10, batch_size=2, watch_every=1, workers=workers)
        common = {"base": str(tiny_world.base), "data": f"folder:{pictures}", "domain": DomainSettings(template="neutral")}
        work = tmp_path / f"work_{workers}"
        pretrain.main(pretrain.Config(tmp_path / f"out_{workers}", work=work, training=settings, **common))
        said = capsys.readouterr().err
        assert said.count("07.png") == 1 and "1 of the 20 pictures" in said
        lines.append([json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()])
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]] and len(lines[0]) == 10
    assert lines[0][-1]["broken_pictures"] == lines[1][-1]["broken_pictures"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train.tune", "--images", "a.png", "--out", "{}/o", "--domain", "{}/nowhere"), "nowhere"),
        (("train.tune", "--images", "x/a.png", "y/a.png", "--out", "{}/o"), "--images: two files have one name"),
        (("train.tune", "--images", "a.png", "--out", "/proc/o"), "Cannot write /proc/o"),
        (("train.pretrain", "--base", "{}/nowhere", "--out", "{}/o"), "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_a_status(arguments, said, tmp_path):
    done = call(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_base_is_trained_and_written(tmp_path):
    """All three stages for two steps each; the folder is read back, and a finished run has nothing left to do."""
    from e4t_jax import bases
    from e4t_jax.cli import base
    from e4t_jax.creatures.base_stages import BaseSettings

    steps = {"autoencoder_steps": 2, "denoiser_steps": 2, "contrast_steps": 2}
    config = base.Config(tmp_path / "base", work=tmp_path / "work", training=BaseSettings(pictures=64, batch_size=16, **steps))
    base.main(config)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "base").rglob("*.safetensors")}
    loaded, params = bases.load_folder(tmp_path / "base")
    assert set(params) == {"vae", "unet", "text_encoder", "image_encoder"}
    assert loaded.scaling_factor != 1.0
    base.main(config)
    assert written == {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "base").rglob("*.safetensors")}


def test_judges_are_trained_and_written(tmp_path):
    from e4t_jax.cli import judges
    from e4t_jax.creatures.judge_stages import JudgeSettings
    from e4t_jax.creatures.judges import load_judges

    steps = {"identity_steps": 2, "scene_steps": 2, "attribute_steps": 2}
    judges.main(judges.Config(tmp_path, training=JudgeSettings(identities=64, scenes=256, creatures=256, **steps)))
    assert set(load_judges(tmp_path)) == {"identity", "scene", "attributes"}


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


def test_compiled_programs_are_kept_unless_told_otherwise(tmp_path):
    """In the user's cache folder; the child's own environment names none."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    source = """
from dataclasses import dataclass
import jax
from e4t_jax.cli.shared import Command, run

@dataclass(frozen=True)
class Config(Command):
    "A script that compiles something."

def main(config: Config) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))

run(main)
"""
    (tmp_path / "script.py").write_text(source)
    for flags, kept in ((["--no-cache"], False), ([], True)):
        subprocess.run([sys.executable, tmp_path / "script.py", *flags], env=environment, check=True, timeout=120)
        assert (tmp_path / "cache" / "e4t-jax" / "compiled").exists() == kept
