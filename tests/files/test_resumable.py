"""Concepts and pictures as files from Python: written as they come, and only what is missing when asked again."""

import pytest

from e4t_jax.errors import UserError
from e4t_jax.files.concept_files import concept_at, load_concept
from e4t_jax.files.domain_files import load_domain
from e4t_jax.files.resumable import draw_to_files, tune_to_files
from e4t_jax.sample import SampleSettings
from e4t_jax.testing import write_tiny_world
from e4t_jax.tuning.tune import TuneSettings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.compiles
def test_what_is_there_is_not_made_again(world, tmp_path):
    """Tuned and drawn, then resumed with one file damaged; a broken picture fails alone."""
    domain = load_domain(world.domain)
    pictures = sorted(world.pictures.iterdir())[:2]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    out = tmp_path / "concepts"

    def tune(**options):
        return tune_to_files(domain, [*pictures, broken], out, TuneSettings(steps=1), caption="a photo of *s", **options)

    first = tune()
    assert first.asked == 3 and set(first.failed) == {"broken"} and isinstance(first.failed["broken"], UserError)
    assert first.sizes == {path.stem: (out / f"{path.stem}.safetensors").stat().st_size for path in pictures}
    before = written(out)
    damaged = out / f"{pictures[0].stem}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert concept_at(damaged) is None and concept_at(tmp_path / "nothing.safetensors") is None
    assert tune(resume=True).sizes == first.sizes
    after = written(out)
    assert {name for name in after if after[name] != before[name]} == {damaged.name}
    assert concept_at(damaged).origin == load_concept(damaged).origin != ""

    def draw(**options):
        prompts = ["*s", "a photo of *s"]
        return draw_to_files(domain, sorted(out.iterdir()), prompts, tmp_path / "drawn", SampleSettings(steps=2), **options)

    drawn = draw()
    assert (drawn.asked, drawn.drawn, drawn.failed) == (2, 2, {}) and [len(files) for files in drawn.files.values()] == [2, 2]
    before = written(tmp_path / "drawn")
    again = draw(resume=True)
    assert again.drawn == 0 and again.files == drawn.files and written(tmp_path / "drawn") == before


@pytest.mark.compiles
def test_what_concerns_all_is_said_before_anything_is_made(world, tmp_path):
    domain = load_domain(world.domain)
    encoder = tmp_path / "encoder.png"
    encoder.write_bytes((world.pictures / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"encoder.safetensors is a file of the domain itself"):
        tune_to_files(domain, [encoder], world.domain)
    with pytest.raises(UserError, match="images: there is no picture"):
        tune_to_files(domain, [], tmp_path)
    with pytest.raises(UserError, match="prompts: there is none"):
        draw_to_files(domain, list(world.concepts), [], tmp_path)
