"""What this process may use of its machine: cores and memory, the limits of its container among them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

from e4t_jax.errors import UserError

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# Of version 2 and version 1: limit, what is used, and the name in memory.stat of file pages that the kernel gives back when asked.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def core_count() -> int:
    """The CPU's cores that this process may use: its affinity, and its container's quota rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders() if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([allowed, *map(math.ceil, quotas)]))


def free_bytes(devices: Sequence[jax.Device]) -> float:
    """Bytes free on each of some devices of one kind; a CPU's devices share the machine's memory.

    Infinite for an accelerator whose allocator does not say: there, running out is the answer (`is_out_of_memory`).
    """
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in one for one in stats):
        return min(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    return free_on_host() / len(devices) if devices[0].platform == "cpu" else math.inf


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or a device has no more memory to give."""
    return isinstance(error, MemoryError) or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def free_on_host() -> float:
    """Bytes that the system would still give to this process."""
    rooms = [room for folder in _cgroup_folders() if (room := _memory_room(folder)) is not None]
    return min([psutil.virtual_memory().available, *rooms])


def needed_bytes(program: jax.stages.Compiled) -> int:
    """What a compiled program takes on each device beside its arguments, as the compiler says; 0 where it does not."""
    memory: Any = program.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def check_fits(program: jax.stages.Compiled, devices: Sequence[jax.Device], *, lower: str) -> None:
    """Errors: `UserError` where a program takes more than its devices have free; `lower` names the argument to lower."""
    needed, free = needed_bytes(program), free_bytes(devices)
    if needed > free:
        raise UserError(
            f"the program takes {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free; lower it.", lower
        )


def check_holds(tree: Any, devices: Sequence[jax.Device], what: str) -> None:
    """Errors: `UserError` where each of the devices lacks room for the leaves of a tree, arrays or shapes: before they are read."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    free = free_bytes(devices)
    if needed > free:
        mend = "use a machine or device with more memory"
        raise UserError(f"{what} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {mend}.")


def _cgroup_folders() -> Iterator[Path]:
    """The folders of this process's control groups and of all above them: each may set a limit."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            root = _CGROUPS / controller
            own = root / path.lstrip("/")
            # In a container, the path may be the host's; its own limits are at the root it sees.
            yield from {folder for folder in (own, *own.parents, root) if folder.is_relative_to(root) and folder.is_dir()}


def _cpu_quota(folder: Path) -> float | None:
    """Cores that a control group's processes may keep busy together; None where it sets no limit."""
    for read in (
        lambda: (folder / "cpu.max").read_text().split(),
        lambda: [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")],
    ):
        with contextlib.suppress(OSError, ValueError):
            quota, period = read()
            return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    return None


def _memory_room(folder: Path) -> float | None:
    """Bytes that a control group has left; None where it sets no limit."""
    for limit, used, reclaimable in _MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError):
            bound = (folder / limit).read_text().strip()
            if bound == "max":
                return None
            pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int(bound) - int((folder / used).read_text()) + int(pages.get(reclaimable, 0))
    return None
