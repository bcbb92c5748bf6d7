"""`e4t tune` and `e4t generate` on a tiny domain: what is written, again, in part and by several processes."""

import json

import jax
import numpy as np
import pytest

from e4t_jax.errors import UserError


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """A tiny domain's files, and pictures."""
    from e4t_jax.testing import write_tiny_world

    return write_tiny_world(tmp_path_factory.mktemp("world"))


def contents(folder, *endings):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in endings}


def tune_into(out, world, pictures, **options):
    from e4t_jax.cli import tune
    from e4t_jax.tuning.tune import TuneSettings

    tuning, caption = TuneSettings(steps=1), "a photo of *s"  # what compiles soonest
    tune.main(tune.Config(tuple(pictures), out, domain=str(world.domain), tuning=tuning, caption=caption, **options))


def draw_into(out, world, concepts, prompts=("a photo of *s", "*s in the snow"), **options):
    from e4t_jax.cli import generate
    from e4t_jax.sample import SampleSettings

    drawing = SampleSettings(steps=2)
    generate.main(generate.Config(tuple(concepts), prompts, out, domain=str(world.domain), drawing=drawing, **options))


@pytest.mark.compiles
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


@pytest.mark.compiles
def test_weights_in_prompts_are_said_not_to_be_read(tiny_world, tmp_path):
    """Once, however many prompts hold some; and they are drawn as the plain text they are."""
    weighted = ("(*s:1.3) in the snow", "*s++ at night")
    with pytest.warns(UserWarning) as said:
        draw_into(tmp_path, tiny_world, tiny_world.concepts[:1], weighted)
    lines = [str(one.message) for one in said if "not read" in str(one.message)]
    assert lines == ["weights, schedules and files in prompts are not read: (*s:1.3) is plain text here."]
    assert len(contents(tmp_path, ".png")) == 3


@pytest.mark.compiles
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
    draw_into(drawn, tiny_world, concepts, resume=True, dtype="bfloat16")
    assert before < (drawn / "0_0.png").stat().st_mtime_ns, "computed in another dtype, it is another picture"
    assert len(contents(drawn, ".png")) == 7


@pytest.mark.compiles
def test_processes_share_the_pictures_and_make_the_same_concepts(tiny_world, tmp_path, monkeypatch):
    """Two processes, one after the other here, beside one: the same numbers to a step of float16, each in a file of its own."""
    from e4t_jax.files.concept_files import load_concept

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
