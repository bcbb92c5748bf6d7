"""Runs that are killed at random moments and go on: `python killed_runs.py KIND FOLDER TRIALS SEED`, JSON on the last line.

KIND is "toy", a cheap step in the loop of all trainings, or "pretraining": the command itself, as a user calls it, on a tiny base.

Every run is a process of its own, forked from this one when all is imported and no backend is started yet: it costs seconds less.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from e4t_jax.cli import pretrain
from e4t_jax.cli.run import run as run_command
from e4t_jax.testing import write_tiny_world
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.loop import Run, TrainState, train

_STEPS, _EVERY = 12, 2
_POLL = 0.0005  # seconds from one look at a run to the next
_LONGEST_SAVE = 60  # looks


def step(state, frozen, batch, key):
    """Something that depends on all that came before, on the batch and on the number of the step."""
    params = {name: np.cos(leaf * 1.7 + batch + int(state.step)) for name, leaf in state.params.items()}
    moments = {name: 0.9 * state.moments[name] + leaf for name, leaf in params.items()}
    time.sleep(0.002)
    return TrainState(params, moments, state.step + 1), {"loss": np.float32(1)}


def batches(first):
    """Batch k is batch k in every run."""
    return (np.random.default_rng(index).standard_normal() for index in range(first, _STEPS))


def run_toy(folder, resume):
    """The whole run, or what is left of it; its result beside the folder of its checkpoints."""
    zeros = {"a": np.zeros((40, 50), np.float32), "b": np.zeros(7, np.float32)}
    state = TrainState(zeros, zeros, np.zeros((), np.int32))
    with Checkpoints(folder / "checkpoints", {"seed": 1}, resume=resume, say=print) as checkpoints:
        restored = checkpoints.restore(state)
        state = train(
            Run("toy", _STEPS, checkpoints, _EVERY), step, state if restored is None else restored, None, batches, key=None
        )
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((state.params, state.moments))])
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "result").write_bytes(flat.tobytes())


def run_pretraining(folder, resume):
    """`e4t pretrain` to its end: base and pictures read, compiled, trained, saved, the domain written."""
    world = folder.parent / "world"
    numbers = {"steps": _STEPS, "batch-size": 2, "checkpoint-every": _EVERY}
    arguments = ["--base", world / "base", "--data", f"folder:{world / 'pictures'}", "--work", folder, "--out", folder / "out"]
    arguments += [word for name, number in numbers.items() for word in (f"--{name}", number)]
    arguments += ["--domain-token", "creature", *(["--resume"] if resume else [])]
    run_command(pretrain.main, [str(word) for word in arguments])


RUNS = {"toy": run_toy, "pretraining": run_pretraining}


def start(kind, folder, *, resume=False):
    """The run in a process of its own; all that it says goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        RUNS[kind](folder, resume)
        status = 0
    except BaseException as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def ends_well(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def result_of(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def saved_steps(folder):
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]


def is_saving(folder):
    """Whether a checkpoint is being written just now: its folder has a name of its own until it is whole, or lacks its digests."""
    written = list((folder / "checkpoints").glob("*"))
    return any("tmp" in path.name or (path.name.isdecimal() and not (path / "digests.json").exists()) for path in written)


def kill_at_random(child, folder, seconds, generator, *, saving):
    """SIGKILL at a moment of a run's `seconds`, its start included, or at one while it saves; False where it ended before that."""
    deadline = time.monotonic() + generator.uniform(0, seconds)
    after, looks = generator.randrange(0, _STEPS, _EVERY), generator.randrange(_LONGEST_SAVE)
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        looks -= saving and is_saving(folder) and max(saved_steps(folder), default=0) >= after
        if looks < 0 if saving else time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(_POLL)
    return False


def main():
    kind, folder, trials, generator = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    if kind == "pretraining":
        maker = os.fork()  # which may start a backend
        if not maker:
            write_tiny_world(folder / "world")
            os._exit(0)
        assert ends_well(maker)
        assert ends_well(start(kind, folder / "first")), (folder / "first" / "error").read_text()  # what it compiled is kept
    began = time.monotonic()
    assert ends_well(start(kind, folder / "whole")), (folder / "whole" / "error").read_text()
    whole, seconds = result_of(folder / "whole"), time.monotonic() - began
    names = ("killed_while_saving", "killed_before_a_save", "finished", "identical")
    figures = {"trials": trials, **dict.fromkeys(names, 0), "errors": []}
    for trial in range(trials):
        own = folder / str(trial)
        while not kill_at_random(start(kind, own), own, seconds, generator, saving=trial % 2):
            shutil.rmtree(own)  # it ended before that moment: another one
        figures["killed_while_saving"] += is_saving(own)
        figures["killed_before_a_save"] += not saved_steps(own)
        if ends_well(start(kind, own, resume=True)):
            figures["finished"] += 1
            figures["identical"] += result_of(own) == whole
        else:
            figures["errors"].append((own / "error").read_text())
    print(json.dumps({**figures, "seconds_of_a_run": round(seconds, 1)}))


if __name__ == "__main__":
    main()
