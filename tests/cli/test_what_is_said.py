"""Lines that name what the user gave, and the mend."""

import pytest
from sandbox import call, make_world, nothing_compiled


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with nothing_compiled():
        yield make_world(tmp_path_factory.mktemp("said"))


def pretrain(world, out, *more):
    small = ["--steps", "2", "--batch-size", "2", "--domain-token", "creature"]
    return call("pretrain", ["--base", world.base, "--data", f"folder:{world.pictures}", "--out", out, *small, *more])


def test_a_second_run_into_one_out_is_told_by_the_flag_that_was_given(world, tmp_path, monkeypatch):
    """Its work folder follows from --out; who gave --work is told of that."""
    monkeypatch.chdir(tmp_path)
    assert pretrain(world, "own").status == 0
    outcome = pretrain(world, "own")
    where = tmp_path / "outputs" / "pretrain" / "own" / "checkpoints"
    mend = "go on with it (--resume, in Python resume=True), or give another folder."
    assert outcome.said == f"Error: --out: {where} holds a run already, at step 2; {mend}"
    outcome = pretrain(world, "own", "--work", "outputs/pretrain/own")
    assert outcome.said == f"Error: --work: {where} holds a run already, at step 2; {mend}"
    assert pretrain(world, "own", "--resume").status == 0


@pytest.mark.parametrize(("word", "nearest"), [("tun", "tune"), ("generat", "generate"), ("evaluation", "evaluate")])
def test_an_unknown_command_is_told_the_nearest(word, nearest):
    from e4t_jax.cli.main import main

    with pytest.raises(SystemExit, match=f"^Error: '{word}' is no command; the nearest is {nearest}; choose one of tune, "):
        main([word])
