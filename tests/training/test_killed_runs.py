"""SIGKILL at random moments, at the start, between saves and in the middle of them: the same run, resumed, ends bit-identical."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

IN_A_LONG_RUN = 20  # trials, of `make fuzz`


def figures_of(kind, folder, trials):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, script, kind, folder, str(IN_A_LONG_RUN if os.environ.get("E4T_FUZZ") else trials), "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(figures):
    assert figures["errors"] == []
    assert figures["finished"] == figures["identical"] == figures["trials"]


@pytest.mark.compiles
def test_a_cheap_step_in_the_loop_of_all_trainings(tmp_path):
    figures = figures_of("toy", tmp_path, 6)
    check(figures)
    assert figures["killed_while_saving"] >= 2


@pytest.mark.slow
def test_pretraining_as_a_user_calls_it(tmp_path):
    """A tiny base and four pictures, all else as it is: read, compiled, trained, saved, written."""
    check(figures_of("pretraining", tmp_path, 3))
