"""Checkpoints: a run goes on only from a sound checkpoint of its own, loses nothing, and ends where an unbroken one does."""

import dataclasses
import json
import shutil
import signal
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sandbox import open_base_once

from e4t_jax.cli import pretrain as command
from e4t_jax.cli.run import run as run_command
from e4t_jax.errors import Stopped, UserError
from e4t_jax.pretraining import settings as pretraining_settings
from e4t_jax.pretraining import step
from e4t_jax.pretraining.pretrain import pretrain
from e4t_jax.pretraining.settings import DomainSettings
from e4t_jax.pretraining.step import PretrainSettings
from e4t_jax.testing import write_tiny_world
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.loop import Run, TrainState, train

FACTS = {"seed": 1, "steps": 10}


def state_of(number):
    return {"weights": np.full((3, 4), number, np.float32), "step": np.asarray(number, np.int32)}


LIKE = state_of(0)


def open_run(folder, facts=FACTS, *, resume=False, said=None, **options):
    return Checkpoints(
        folder, facts, resume=resume, may_change=("steps",), say=[].append if said is None else said.append, **options
    )


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of step 5 and 10."""
    with open_run(tmp_path / "run") as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, state_of(step))
    return tmp_path / "run"


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def restored(folder, said=None):
    with open_run(folder, resume=True, said=said) as checkpoints:
        state = checkpoints.restore(LIKE)
    return None if state is None else int(state["step"])


# whose run it is ----------------------------------------------------------------------------------------------------------


def test_another_run_is_refused_and_nothing_is_deleted(saved):
    before = content_of(saved)
    with pytest.raises(UserError, match="holds a run already, at step 10; go on with it"):
        open_run(saved)
    with pytest.raises(UserError, match="holds a run with seed = 1, and 2 is asked for now"):
        open_run(saved, {**FACTS, "seed": 2}, resume=True)
    with pytest.raises(UserError, match="holds a run with another = None, and 3 is asked for now"):
        open_run(saved, {**FACTS, "another": 3}, resume=True)
    assert content_of(saved) == before


def test_what_may_change_is_said(saved):
    said = []
    with open_run(saved, {**FACTS, "steps": 20}, resume=True, said=said) as checkpoints:
        assert checkpoints.latest() == 10
    assert said == [f"The run in {saved} began with steps = 10 and goes on with 20."]


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    assert restored(tmp_path / "new") is None
    with open_run(tmp_path / "new", resume=True) as checkpoints:
        checkpoints.save(5, state_of(5))
    assert restored(tmp_path / "new") == 5


@pytest.mark.parametrize("damage", ["", "{", "[]", None], ids=["empty", "cut", "no object", "missing"])
def test_a_run_of_which_nothing_is_known_is_not_gone_on_with(saved, damage):
    (saved / "facts.json").unlink() if damage is None else (saved / "facts.json").write_text(damage)
    with pytest.raises(UserError, match=r"facts.json .*give another work folder"):
        open_run(saved, resume=True)


def test_one_process_at_a_time_has_a_folder(saved):
    with open_run(saved, resume=True), pytest.raises(UserError, match="another process works in"):
        open_run(saved, resume=True)
    assert restored(saved) == 10


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"work: Cannot write .*: a file is in its place"):
        open_run(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


# what is damaged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["emptied", "flipped", "cut", "deleted"])
def test_the_newest_damaged_in_each_of_its_files_is_said_and_the_older_one_restored(saved, tmp_path, how):
    files = [path.relative_to(saved) for path in (saved / "10").rglob("*") if path.is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        own = tmp_path / str(number)
        shutil.copytree(saved, own)
        content = (own / name).read_bytes()
        if how == "deleted":
            (own / name).unlink()
        elif how == "flipped" and content:
            (own / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            (own / name).write_bytes(content[: len(content) // 2] if how == "cut" else b"")
        said = []
        assert restored(own, said) == (10 if (own / name).exists() and (own / name).read_bytes() == content else 5), name
        if not ((own / name).exists() and (own / name).read_bytes() == content):
            assert len(said) == 1 and said[0].startswith(f"The checkpoint of step 10 in {own} is passed over: "), name
            assert len(said[0].splitlines()) == 1


def test_a_run_goes_on_saving_after_a_damaged_checkpoint(saved):
    """At steps before it, too, where checkpoints come more often now: the store itself would pass those over in silence."""
    next((saved / "10").rglob("d/*")).write_bytes(b"")
    with open_run(saved, resume=True) as checkpoints:
        assert int(checkpoints.restore(LIKE)["step"]) == 5 and checkpoints.latest() == 5
        for step in (7, 9, 10):
            checkpoints.save(step, state_of(step))
    assert restored(saved) == 10
    shutil.rmtree(saved / "10")
    assert restored(saved) == 9


def test_the_older_one_is_there_until_another_is_whole(saved):
    """The damaged newest goes only when its successor is about to be written."""
    (saved / "10" / "digests.json").unlink()
    assert restored(saved) == 5 and restored(saved) == 5
    assert (saved / "5").is_dir() and (saved / "10").is_dir()


def test_none_that_is_sound_is_one_line_and_nothing_is_deleted(saved):
    for number in (5, 10):
        next((saved / str(number)).rglob("d/*")).write_bytes(b"")
    before = content_of(saved)
    with (
        open_run(saved, resume=True) as checkpoints,
        pytest.raises(UserError, match="holds no sound checkpoint; delete the folder"),
    ):
        checkpoints.restore(LIKE)
    assert content_of(saved) == before


def test_what_a_killed_process_left_is_passed_over_and_cleared(saved):
    """Orbax's own temporary folders, and a checkpoint whose digests were not written yet."""
    shutil.copytree(saved / "10", saved / "15")
    (saved / "15" / "digests.json").unlink()
    (saved / "20.orbax-checkpoint-tmp-0").mkdir()
    (saved / "20.orbax-checkpoint-tmp-0" / "half").write_text("half")
    said = []
    assert restored(saved, said) == 10
    assert said == [f"The checkpoint of step 15 in {saved} is passed over: it is incomplete."]
    assert not list(saved.glob("*tmp*"))


def test_a_save_that_fails_is_one_line_and_the_older_ones_stay(saved, monkeypatch):
    with open_run(saved, resume=True) as checkpoints:

        def fail(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(UserError, match=r"Cannot write a checkpoint .*No space left.*free some space and resume"):
            checkpoints.save(15, state_of(15))
    assert restored(saved) == 10


def test_on_a_disk_that_fills_the_older_checkpoint_stays(tmp_path):
    """A true one, of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "t", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting is not permitted")
    try:
        big = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
        like = {"weights": big, "step": np.asarray(0, np.int32)}
        with open_run(disk / "run") as checkpoints:
            checkpoints.save(5, {**like, "step": np.asarray(5, np.int32)})
            with pytest.raises(UserError, match=r"Cannot write a checkpoint .*free some space and resume") as error:
                for step in (10, 15, 20):
                    checkpoints.save(step, {"weights": big + np.float32(step), "step": np.asarray(step, np.int32)})
            assert len(str(error.value).splitlines()) == 1
        assert not list((disk / "run").glob("*tmp*"))
        with pytest.raises(UserError, match=r"GB left, and .* free some space"):
            open_run(disk / "run", resume=True)
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        with open_run(disk / "run", resume=True) as checkpoints:
            state = checkpoints.restore(like)
            np.testing.assert_array_equal(state["weights"], big if state["step"] == 5 else big + np.float32(state["step"]))
    finally:
        subprocess.run(["umount", disk], check=True)


# runs that end -----------------------------------------------------------------------------------------------------------


def toy_step(bad_from=10**9, where="params"):
    """Adds one to every number; from a step on, what it makes is not finite."""

    def step(state, frozen, batch, key):
        number = int(state.step)
        parts = {name: {"w": getattr(state, name)["w"] + 1} for name in ("params", "moments")}
        if number >= bad_from and where in parts:
            parts[where] = {"w": parts[where]["w"] * np.inf}
        loss = np.float32(np.nan if where == "loss" and number >= bad_from else 1)
        return TrainState(**parts, step=jnp.asarray(state.step) + 1), {"loss": loss}

    return step


def toy_state():
    return TrainState({"w": np.zeros(3, np.float32)}, {"w": np.zeros(3, np.float32)}, jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("where", ["params", "moments", "loss"])
def test_what_is_not_finite_is_never_saved_and_the_last_good_one_is_kept(tmp_path, where):
    with open_run(tmp_path / "run") as checkpoints:
        run = Run("toy", 20, checkpoints, every=5)
        with pytest.raises(
            UserError, match=r"is not finite at step 10; lower the learning rate and give another work folder"
        ) as error:
            train(run, toy_step(7, where), toy_state(), None, lambda first: iter(range(first, 20)), key=jax.random.key(0))
        assert f"{tmp_path / 'run'} keeps step 5, the last good one" in str(error.value)
    assert restored_toy(tmp_path / "run") == 5


def restored_toy(folder):
    with open_run(folder, resume=True) as checkpoints:
        state = checkpoints.restore(toy_state())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    return int(state.step)


def test_weights_that_are_not_finite_at_the_end_are_told_without_checkpoints_too():
    with pytest.raises(UserError, match="A weight, or a moment of the optimiser, is not finite at step 8; lower the learning rate"):
        train(Run("toy", 8), toy_step(7), toy_state(), None, lambda first: iter(range(first, 8)), key=jax.random.key(0))


def test_a_run_that_is_asked_to_stop_saves_within_the_step(tmp_path):
    asked = iter([False, False, True])
    with open_run(tmp_path / "run") as checkpoints:
        run = Run("toy", 20, checkpoints, every=50, stop=lambda: next(asked))
        with pytest.raises(Stopped) as stopped:
            train(run, toy_step(), toy_state(), None, lambda first: iter(range(first, 20)), key=jax.random.key(0))
    assert stopped.value.step == restored_toy(tmp_path / "run") == 3


# pretraining, with a step that costs nothing -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def cheap(monkeypatch):
    """Pretraining as it is, but for the step: every number grows by the learning rate, and each step is noted."""
    steps = []

    def compile_step(*_, **__):
        def step(state, weights, rows, key):
            steps.append(int(state.step))
            for hook in hooks:
                hook(steps[-1])
            grow = jax.tree.map(lambda leaf: np.asarray(leaf) * rate[0], state.params)
            return dataclasses.replace(state, params=grow, step=jnp.asarray(state.step) + 1), {"loss": np.float32(1)}

        step.lower = lambda *_: SimpleNamespace(compile=lambda: None)
        return step

    hooks, rate = [], [1.0]
    monkeypatch.setattr(step, "compile_step", compile_step)
    monkeypatch.setattr(step, "tflop_of", lambda *_: None)
    monkeypatch.setattr(step, "check_fits", lambda *_, **__: None)
    monkeypatch.setattr(pretraining_settings, "open_base", open_base_once)
    return dataclasses.make_dataclass("Cheap", ["steps", "hooks", "rate"])(steps, hooks, rate)


SETTINGS = PretrainSettings(steps=4, batch_size=2, checkpoint_every=2)


def go(world, work, settings=SETTINGS, domain=None, *, base=None, data=None, **options):
    return pretrain(
        str(base or world.base),
        data or f"folder:{world.pictures}",
        domain or DomainSettings("creature"),
        settings,
        work=work,
        **options,
    )


@pytest.mark.compiles
def test_a_run_goes_on_only_as_the_run_it_is(world, cheap, tmp_path):
    """Base, scheduler, domain token, data, pictures, seed, rate: each is compared, and nothing deleted; what may change is said."""
    work = tmp_path / "work"
    go(world, work)
    before = content_of(work)
    other = write_tiny_world(tmp_path / "other")
    settings = json.loads((other.base / "scheduler" / "scheduler_config.json").read_text())
    (other.base / "scheduler" / "scheduler_config.json").write_text(json.dumps({**settings, "beta_end": 0.02}))
    pictures = tmp_path / "pictures"
    shutil.copytree(world.pictures, pictures)
    for what, options in {
        "scheduler": {"base": other.base},
        "domain_token": {"domain": DomainSettings("cat")},
        "template": {"domain": DomainSettings("creature", "object")},
        "data": {"data": f"folder:{pictures}"},
        "seed": {"settings": dataclasses.replace(SETTINGS, seed=1)},
        "learning_rate": {"settings": dataclasses.replace(SETTINGS, learning_rate=1e-3)},
        "regularisation": {"settings": dataclasses.replace(SETTINGS, regularisation=1e-3 / 2)},
        "own_optimiser": {"tx": step.optimizers.pretraining(1e-3, 4)},
    }.items():
        with pytest.raises(UserError, match=f"holds a run with {what} = "):
            go(world, work, **options, resume=True)
        with pytest.raises(UserError, match="holds a run already, at step 4"):
            go(world, work, **options)
    # The same folder with another picture in the place of one of its own.
    last = world.pictures / "3.png"
    picture = last.read_bytes()
    last.write_bytes((world.pictures / "2.png").read_bytes() + b"\0")
    with pytest.raises(UserError, match="holds a run with files = "):
        go(world, work, resume=True)
    last.write_bytes(picture)
    assert content_of(work) == before
    said = []
    go(world, work, dataclasses.replace(SETTINGS, steps=6, batch_size=4), resume=True, say=said.append)
    assert [line.partition(" began with ")[2].partition(" = ")[0] for line in said] == ["batch_size", "steps"]
    assert cheap.steps == [0, 1, 2, 3, 4, 5]


@pytest.mark.compiles
def test_a_mistake_is_said_before_a_run_is_touched(world, cheap, tmp_path):
    work = tmp_path / "work"
    go(world, work)
    before = content_of(work)
    for options in (
        {"domain": DomainSettings("creature", "bogus")},
        {"domain": DomainSettings("two words")},
        {"data": "folder:/nowhere"},
        {"data": "bogus"},
        {"base": tmp_path / "nowhere"},
        {"settings": dataclasses.replace(SETTINGS, accumulate=4)},
        {"settings": dataclasses.replace(SETTINGS, batch_size=400)},
        {"settings": dataclasses.replace(SETTINGS, steps=0)},
        {"settings": dataclasses.replace(SETTINGS, seed=-1)},
    ):
        for resume in (False, True):
            with pytest.raises(UserError):
                go(world, work, **options, resume=resume)
    assert content_of(work) == before


def call(*arguments):
    """The exit status of the command, or the line that it ends with."""
    try:
        run_command(command.main, [str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def arguments(world, folder, *more):
    fixed = ("--base", world.base, "--data", f"folder:{world.pictures}", "--domain-token", "creature", "--batch-size", 2)
    return ("--out", folder / "out", "--work", folder / "work", *fixed, "--steps", 20, "--checkpoint-every", 5, *more)


@pytest.mark.compiles
def test_sigterm_saves_within_the_step_ends_well_and_resuming_goes_on(world, cheap, tmp_path, capsys):
    cheap.hooks.append(lambda step: step == 7 and signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert call(*arguments(world, tmp_path)) == 0
    line = f"Stopped as asked, after saving step 8 in {tmp_path / 'work'}; the same command with --resume goes on."
    assert line in capsys.readouterr().err.splitlines()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "out").exists()
    cheap.hooks.clear()
    assert call(*arguments(world, tmp_path, "--resume")) == 0
    assert cheap.steps == list(range(20))
    assert (tmp_path / "out" / "domain.json").exists()


@pytest.mark.compiles
def test_a_rate_that_explodes_ends_with_one_line_whose_advice_works(world, cheap, tmp_path):
    assert call(*arguments(world, tmp_path, "--learning-rate", "1e30")).startswith("Error: --learning-rate: 1e+30 is out of range")
    assert not (tmp_path / "work").exists()
    cheap.hooks.append(lambda step: cheap.rate.__setitem__(0, 1.0 if step < 7 else np.inf))
    with np.errstate(invalid="ignore"):
        said = call(*arguments(world, tmp_path, "--learning-rate", "10"))
    assert said.startswith(
        "Error: pretraining: A weight, or a moment of the optimiser, is not finite at step 10; lower the learning rate"
    )
    assert "keeps step 5, the last good one" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    cheap.hooks.clear()
    cheap.rate[0] = 1.0
    assert call(*arguments(world, tmp_path, "--learning-rate", "10", "--resume")) == 0  # the kept one is sound
    assert cheap.steps[10:] == list(range(5, 20))
    lower = arguments(world, tmp_path, "--learning-rate", "1e-3")
    assert "holds a run already" in call(*lower)
    assert call(*(tmp_path / "other" if argument == tmp_path / "work" else argument for argument in lower)) == 0


@pytest.mark.parametrize("argument", ["--work", "--out"])
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/e4t"])
def test_folders_that_cannot_be_written_are_one_line(world, cheap, tmp_path, argument, place):
    (tmp_path / "file").write_text("mine")
    given = list(arguments(world, tmp_path))
    given[given.index(argument) + 1] = tmp_path / place
    said = call(*given)
    assert said.startswith(f"Error: {argument}: Cannot write {tmp_path / place}") and len(said.splitlines()) == 1
    assert cheap.steps == [] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.compiles
def test_a_users_own_files_in_the_folders_stay(world, cheap, tmp_path):
    for folder in ("out", "work"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".probe").write_text("mine")
    assert call(*arguments(world, tmp_path)) == 0
    assert (tmp_path / "out" / ".probe").read_text() == (tmp_path / "work" / ".probe").read_text() == "mine"
