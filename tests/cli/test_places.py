"""What a command writes never takes the place of what it reads, and what is wrong with a late step is said first."""

import pytest
from sandbox import call, make_world, nothing_compiled


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    with nothing_compiled():
        yield make_world(folder)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["encoder", "offsets"])
def test_a_concept_never_takes_the_place_of_a_domains_file(world, tmp_path, name):
    """A picture of that name, tuned into the folder of a domain; elsewhere it may have it."""
    picture = tmp_path / f"{name}.png"
    picture.write_bytes((world.pictures / "0.png").read_bytes())
    before = content_of(world.domain)
    common = ["--images", picture, "--domain", world.domain, "--steps", "1", "--out"]
    outcome = call("tune", [*common, world.domain])
    assert outcome.is_one_line and f"{name}.safetensors is a file of the domain itself" in outcome.said
    assert content_of(world.domain) == before
    assert call("tune", [*common, tmp_path / "out"]).status == 0


@pytest.mark.compiles
@pytest.mark.parametrize("how", ["as it is", "by way of a link"])
def test_an_export_never_takes_the_place_of_the_base(world, tmp_path, how):
    out = world.base
    if how == "by way of a link":
        out = tmp_path / "link"
        out.symlink_to(world.base)
    before = content_of(world.base)
    common = ["--concept", world.concepts[0], "--domain", world.domain, "--out"]
    outcome = call("export", [*common, out])
    assert outcome.is_one_line and "--out: " in outcome.said and "holds the base that the domain was trained on" in outcome.said
    assert content_of(world.base) == before
    assert call("export", [*common, tmp_path / "out"]).status == 0


def test_steps_that_no_sampler_takes_are_told_before_tuning_by_the_commands_own_flag(world, tmp_path):
    outcome = call("evaluate", ["--domain", world.domain, "--out", tmp_path / "out", "--sampling-steps", "1001"])
    assert outcome.is_one_line and outcome.said.startswith("Error: --sampling-steps: 1001 is out of range"), outcome
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("flag", "value", "most"), [("seed", 2**32, 2**32 - 1), ("steps", 10**7, 10**6)])
def test_a_number_too_large_is_told_the_largest(world, tmp_path, flag, value, most):
    outcome = call("tune", ["--images", world.pictures / "0.png", "--out", tmp_path / "out", f"--{flag}", value])
    assert outcome.is_one_line and outcome.said == f"Error: --{flag}: {value} is out of range; give 0 or more and at most {most}."


def test_a_word_that_is_no_choice_is_said_without_rules(world, tmp_path):
    outcome = call("train-judges", ["--out", tmp_path / "out", "--only", "x"])
    assert outcome.is_one_line and "invalid choice 'x'" in outcome.said and "--only" in outcome.said
    assert "---" not in outcome.said and "───" not in outcome.said
