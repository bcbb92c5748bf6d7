"""Cores as devices: what waits for another on a busy machine waits for hours, not for the 40 seconds that end the process."""

import os
import subprocess
import sys

import pytest

from e4t_jax.cli.cores import use_all_cores

WAITS = ("xla_cpu_collective_call_terminate_timeout_seconds", "xla_cpu_collective_timeout_seconds")


@pytest.mark.parametrize("given", ["", f"--{WAITS[0]}=7"])
def test_devices_wait_for_each_other_for_hours_and_the_users_own_limit_stays(monkeypatch, given):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count=2 {given}")
    use_all_cores()
    flags = dict(flag.removeprefix("--").split("=") for flag in os.environ["XLA_FLAGS"].split())
    assert flags[WAITS[0]] == ("7" if given else "36000") and flags[WAITS[1]] == "36000"


def test_the_backend_knows_these_limits():
    """A flag that it does not know would end the process at its start."""
    code = "from e4t_jax.cli.cores import use_all_cores; use_all_cores(); import jax; print(jax.device_count())"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
