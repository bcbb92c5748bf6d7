"""Runs of a toy that are killed at random moments and go on: `python killed_runs.py FOLDER TRIALS SEED`, JSON on the last line.

Every run is a process of its own, forked from this one when all is imported and no backend is started yet: it costs a second.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.loop import Run, TrainState, train

_STEPS, _EVERY = 12, 2


def step(state, frozen, batch, key):
    """Something that depends on all that came before, on the batch and on the number of the step."""
    params = {name: np.cos(leaf * 1.7 + batch + int(state.step)) for name, leaf in state.params.items()}
    moments = {name: 0.9 * state.moments[name] + leaf for name, leaf in params.items()}
    time.sleep(0.002)
    return TrainState(params, moments, state.step + 1), {"loss": np.float32(1)}


def batches(first):
    """Batch k is batch k in every run."""
    return (np.random.default_rng(index).standard_normal() for index in range(first, _STEPS))


def run(folder, said):
    """The whole run, or what is left of it; its result beside the folder of its checkpoints."""
    zeros = {"a": np.zeros((40, 50), np.float32), "b": np.zeros(7, np.float32)}
    state = TrainState(zeros, zeros, np.zeros((), np.int32))
    with Checkpoints(folder / "checkpoints", {"seed": 1}, resume=True, say=said) as checkpoints:
        restored = checkpoints.restore(state)
        state = train(Run("toy", _STEPS, checkpoints, _EVERY), step, state if restored is None else restored, None, batches, None)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((state.params, state.moments))])
    (folder / "result").write_bytes(flat.tobytes())


def start(folder):
    """The run in a process of its own; what it is told goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(folder / "said", "a") as file:
            run(folder, lambda line: print(line, file=file))
        status = 0
    except BaseException as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def ended(child):
    return os.waitpid(child, os.WNOHANG)[0] != 0


def is_saving(folder):
    """Whether a checkpoint is being written just now: its folder has a name of its own until it is whole, or lacks its digests."""
    written = list((folder / "checkpoints").glob("*"))
    return any("tmp" in path.name or (path.name.isdecimal() and not (path / "digests.json").exists()) for path in written)


def main():
    folder, trials, generator = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(folder / "whole"), 0)[1]) == 0, (folder / "whole" / "error").read_text()
    whole, seconds = (folder / "whole" / "result").read_bytes(), time.monotonic() - began
    figures = {"trials": trials, "killed": 0, "killed_while_saving": 0, "finished": 0, "identical": 0, "errors": []}
    for trial in range(trials):
        own = folder / str(trial)
        child, deadline = start(own), time.monotonic() + generator.uniform(0, seconds)
        # Half of them at any moment, half in the middle of a save.
        gone, saves = False, 0
        while not gone:
            gone = ended(child)
            if trial % 2 and is_saving(own):
                saves += 1
                if saves > trial:
                    break
            elif not trial % 2 and time.monotonic() > deadline:
                break
            time.sleep(0.0005)
        if not gone:
            figures["killed_while_saving"] += is_saving(own)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            figures["killed"] += 1
        if os.waitstatus_to_exitcode(os.waitpid(start(own), 0)[1]) == 0:
            figures["finished"] += 1
            figures["identical"] += (own / "result").read_bytes() == whole
        else:
            figures["errors"].append((own / "error").read_text())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
