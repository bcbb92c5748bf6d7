"""Ten steps over devices and processes: the same losses and weights on every one of them, and on after a stop on fewer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("equal_runs.py")
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
    """The largest relative difference of the losses, and of any leaf of the weights, in its own norm."""
    apart = [np.max(np.abs(one["losses"][-len(other["losses"]) :] / other["losses"] - 1))]
    for name in one.keys() - {"losses", "steps"}:
        apart.append(np.linalg.norm(one[name] - other[name]) / max(np.linalg.norm(one[name]), 1e-6))
    return max(apart)


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
    assert "another process of the run has ended or cannot be reached" in said.strip().splitlines()[-1]
    victim.communicate()
