"""Cores and memory, with the limits of a container."""

import os

import jax
import psutil
import pytest

from e4t_jax import machine
from e4t_jax.errors import UserError


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """A control group of version 2 below another; returns what writes a file of one of them."""
    root = tmp_path / "cgroup"
    (root / "pod" / "container").mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/pod/container\n")
    monkeypatch.setattr(machine, "_CGROUPS", root)
    monkeypatch.setattr(machine, "_OWN_CGROUPS", own)
    return lambda name, content: (root / name).write_text(content)


def test_a_quota_of_the_cpu_counts_rounded_up(cgroup, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert machine.core_count() == 16
    cgroup("pod/container/cpu.max", "max 100000\n")
    assert machine.core_count() == 16
    cgroup("pod/cpu.max", "250000 100000\n")
    assert machine.core_count() == 3


def test_a_small_quota_leaves_one_core(cgroup):
    cgroup("pod/container/cpu.max", "5000 100000\n")
    assert machine.core_count() == 1


def test_the_memory_limit_of_a_container_counts_less_what_is_used(cgroup):
    """What the kernel would give back is not used: 3 of 10 GB are, 1 of them pages of files."""
    assert machine.free_on_host() <= psutil.virtual_memory().total
    cgroup("pod/container/memory.max", "max\n")
    cgroup("pod/memory.max", "10000\n")
    cgroup("pod/memory.current", "3000\n")
    cgroup("pod/memory.stat", "anon 2000\ninactive_file 1000\n")
    assert machine.free_on_host() == 8000


def test_version_1_of_control_groups_is_read_too(tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    for name, content in {
        "memory/memory.limit_in_bytes": "5000",
        "memory/memory.usage_in_bytes": "1000",
        "memory/memory.stat": "total_inactive_file 500",
        "cpu/cpu.cfs_quota_us": "150000",
        "cpu/cpu.cfs_period_us": "100000",
    }.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert machine.free_on_host() == 4500 and machine.core_count() == 2


def test_weights_that_the_machine_cannot_hold_are_one_line(monkeypatch):
    """Said of shapes, before a number is read."""
    monkeypatch.setattr(machine, "free_on_host", lambda: 3e9)
    shapes = {"kernel": jax.ShapeDtypeStruct((1000, 1000, 1000), "float32")}
    machine.check_holds({}, jax.local_devices()[:1], "no weights")
    with pytest.raises(UserError, match=r"the weights of big take 4.0 GB, and 3.0 GB are free; use a machine"):
        machine.check_holds(shapes, jax.local_devices()[:1], "the weights of big")


def test_a_program_that_the_machine_cannot_hold_is_one_line(monkeypatch):
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((100, 100), "float32")).compile()
    machine.check_fits(program, jax.local_devices()[:1], lower="batch_size")
    monkeypatch.setattr(machine, "free_on_host", lambda: 1000.0)
    with pytest.raises(UserError, match=r"batch_size: the program takes 0.0 GB beside the weights, and 0.0 GB are free; lower it"):
        machine.check_fits(program, jax.local_devices()[:1], lower="batch_size")
