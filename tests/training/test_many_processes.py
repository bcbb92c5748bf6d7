"""Ten steps over devices and processes: the same losses and weights on every one of them, and on after a stop on fewer."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "equal_runs.py"
WAYS = {
    "8 devices": (1, 8, {}),
    "8 devices, data x fsdp": (1, 8, {"fsdp": 4}),
    "8 devices, pmap": (1, 8, {"parallel": "pmap"}),
    "2 processes of 4": (2, 4, {}),
    "2 processes of 2, pmap": (2, 2, {"parallel": "pmap"}),
    "4 processes of 2, data x fsdp": (4, 2, {"fsdp": 2}),
    "2 devices, 4 parts": (1, 2, {"accumulate": 4}),
}


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def start(out, folder, processes, devices, options):
    """The processes of a run, each with its own output."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": ""}
    command = [sys.executable, str(SCRIPT), str(out), json.dumps(options), str(folder)]
    where = [] if processes == 1 else [f"localhost:{free_port()}", str(processes)]
    return [
        subprocess.Popen([*command, *where, *([str(which)] if where else [])], env=environment, stderr=subprocess.PIPE, text=True)
        for which in range(processes)
    ]


def finish(out, *arguments):
    for process in start(out, *arguments):
        said = process.communicate(timeout=600)[1]
        assert process.returncode == 0, said
    return dict(np.load(out)) if out.exists() else None


def distance(one, other):
    """The largest relative difference of a loss, and that of all weights together.

    Not of every leaf: Adam makes steps of one length of gradients that are rounding alone, as a bias's that begins at 0 are.
    """
    names = sorted(one.keys() - {"losses", "steps"})
    flat, flat_other = (np.concatenate([np.ravel(run[name]) for name in names]) for run in (one, other))
    losses = np.abs(one["losses"][-len(other["losses"]) :] / other["losses"] - 1)
    return max(losses.max(), np.linalg.norm(flat - flat_other) / np.linalg.norm(flat))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one device."""
    folder = tmp_path_factory.mktemp("alone")
    return finish(folder / "out.npz", folder / "checkpoints", 1, 1, {})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_ten_steps_are_the_same_everywhere(alone, tmp_path, way):
    """In float32, of one global batch: losses and weights within 1e-4 of those on one device."""
    assert len(alone["losses"]) == 10
    assert distance(alone, finish(tmp_path / "out.npz", tmp_path / "checkpoints", *WAYS[way])) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((1, 8, {"fsdp": 4}), (1, 4, {})), ((2, 2, {}), (1, 2, {}))], ids=["8 to 4 devices", "2 to 1 processes"]
)
def test_a_run_goes_on_over_fewer(alone, tmp_path, before, after):
    """Stopped after six steps: the last four losses, and the weights, within 1e-4 of an unbroken run's."""
    processes, devices, options = before
    assert finish(tmp_path / "out.npz", tmp_path / "checkpoints", processes, devices, {**options, "until": 6}) is None
    learned = finish(tmp_path / "out.npz", tmp_path / "checkpoints", *after)
    assert list(learned["steps"]) == [7, 8, 9, 10]
    assert distance(alone, learned) <= 1e-4


def newest(folder):
    """The last step whose checkpoint has a folder."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


def is_saving(folder):
    """Whether a checkpoint is on its way: its folder has a name of its own until it is whole, or lacks its digests."""
    return any("tmp" in path.name or (path.name.isdecimal() and not (path / "digests.json").exists()) for path in folder.glob("*"))


@pytest.mark.slow
def test_killed_at_random_moments_a_run_of_two_processes_ends_bit_identical(tmp_path):
    """Both killed, every second time in the middle of a save, whichever of the five; then the same again, on the same devices."""
    run = (2, 2, {"checkpoint_every": 2})
    began = time.monotonic()
    whole = finish(tmp_path / "whole.npz", tmp_path / "whole", *run)
    seconds, generator, saving = time.monotonic() - began, random.Random(3), 0
    for trial in range(10 if os.environ.get("E4T_FUZZ") else 2):
        out, folder = tmp_path / f"{trial}.npz", tmp_path / str(trial)
        deadline, before = time.monotonic() + generator.uniform(0.3, 1) * seconds, generator.randrange(0, 9, 2)
        processes = start(out, folder, *run)
        while processes[0].poll() is None:
            if (newest(folder) >= before and is_saving(folder)) if trial % 2 else time.monotonic() > deadline:
                break
            time.sleep(0.001)
        saving += is_saving(folder)
        for process in processes:
            process.kill()
            process.communicate()
        out.unlink(missing_ok=True)
        ended = finish(out, folder, *run)
        for name in whole.keys() - {"losses", "steps"}:
            np.testing.assert_array_equal(whole[name], ended[name], err_msg=f"{trial}: {name}")
    print(f"{trial + 1} killed, {saving} of them within a save")
    assert saving


@pytest.mark.slow
def test_sigterm_to_one_process_saves_on_all(tmp_path):
    """Process 1 is told to end; both do, with status 0, at one step, and the run goes on from it."""
    folder, settings = tmp_path / "checkpoints", {"steps": 10_000, "checkpoint_every": 10_000}
    processes = start(tmp_path / "out.npz", folder, 2, 1, settings)
    while not (tmp_path / "out.npz.begun").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    assert [path.name for path in folder.iterdir() if path.name.isdecimal() and (path / "digests.json").exists()]


@pytest.mark.slow
def test_a_process_that_is_lost_ends_the_others_within_a_minute(tmp_path):
    """Process 1 is killed as soon as there is a checkpoint; process 0 says so in one line."""
    folder = tmp_path / "checkpoints"
    survivor, victim = start(tmp_path / "out.npz", folder, 2, 1, {"steps": 10_000, "checkpoint_every": 2})
    while not list(folder.glob("*/digests.json")):
        assert survivor.poll() is None and victim.poll() is None
        time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = survivor.communicate(timeout=120)[1]
    assert time.monotonic() - began <= 60 and survivor.returncode != 0
    assert " of the run is lost" in said.strip().splitlines()[-1]
    victim.communicate()
