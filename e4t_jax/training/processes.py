"""Many processes as one run: joined before any device is touched, ended together.

Every process runs the same program over its own devices and its own share of the data; process 0 alone prints and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from e4t_jax.checks import Whole
from e4t_jax.errors import UserError, reason_of

# Seconds from one sign of life to the next, and without one after which a process counts as lost. JAX itself, which would end the
# others with a trace of its own, is given more patience.
_SIGN_EVERY = 3
_LOST_AFTER = 20
_JAX_LOST_AFTER = 45
_WAIT_FOR_ALL = 300
_SIGNS = "e4t_jax/signs"
# What JAX's errors begin with when another process does not answer.
_LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "FAILED_PRECONDITION")
# How many processes there are, where a cluster says so: Slurm's srun, Open MPI's mpirun.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# The machines of a slice, where GKE or a pod's own image says so.
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


Thing = TypeVar("Thing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process of how many this one is; all are found from the environment on Cloud TPU, Slurm, Kubernetes and Open MPI."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same for all; "auto" asks the cluster, which Slurm, Open MPI and GKE need no flag for."""
    num_processes: Annotated[int, Whole(1, 1_000_000)] | None = None
    """How many processes there are, where no cluster says so."""
    process_id: Annotated[int, Whole(0, 999_999)] | None = None
    """Which of them this is, from 0, where no cluster says so."""


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """This process as one of the run's; alone where nothing says that there are more. Before any device is touched.

    Whatever ends one process ends all: one that fails does not wait for the others, and they notice within a minute.

    Errors: `UserError` when the others are not found, and when one of them is lost.
    """
    if not _asked_for(processes):
        yield
        return
    _join(processes)
    left = threading.Event()
    threading.Thread(target=_watch_others, args=(left,), daemon=True).start()
    try:
        yield
        left.set()
    except Exception as error:  # what was made of it on the way says less
        if (lost := _loss_among(error)) is None:
            raise
        raise UserError(
            f"process {jax.process_index()}: another process of the run is lost ({reason_of(lost, 80)}); "
            "see what it said, start all again and resume."
        ) from None
    jax.distributed.shutdown()


def end(line: str) -> NoReturn:
    """Ends a process that failed: at once where it is one of many, for leaving in order waits for all."""
    if jax.distributed.is_initialized():
        print(line, file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(line)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def agreed(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest_of_all(values: np.ndarray) -> np.ndarray:
    """Of every number the largest of all processes', on each of them: all must call it."""
    if jax.process_count() == 1:
        return values
    return np.asarray(np.max(multihost_utils.process_allgather(values), axis=0))


def count_on_all(numbers: Collection[int]) -> int:
    """How many different numbers the processes have met together: all must call it."""
    if jax.process_count() == 1:
        return len(numbers)
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(numbers)))))
    if not most:
        return 0
    own = np.full(most, -1, np.int64)
    own[: len(numbers)] = sorted(numbers)
    return len({*np.ravel(multihost_utils.process_allgather(own)).tolist()} - {-1})


def share_of(things: Sequence[Thing]) -> Sequence[Thing]:
    """What of many things is this process's part: every n-th."""
    return things[jax.process_index() :: jax.process_count()]


def own_file(path: Path) -> Path:
    """Where a process writes a file that each has its own of: process 1 `NAME_1.json` for `NAME.json`, the first as it is."""
    return path if is_first() else path.with_stem(f"{path.stem}_{jax.process_index()}")


def stop_of_all() -> Callable[[], bool]:
    """What tells, after every step, whether one of the processes got SIGTERM; all are told at the same step."""
    steps = itertools.count()
    return lambda: multihost_utils.reached_preemption_sync_point(next(steps))


def _loss_among(error: Exception) -> Exception | None:
    """What says that another process does not answer, among an error and those it came from; None where nothing does."""
    chain: BaseException | None = error
    while chain is not None:
        # Some of what JAX says comes as a ValueError.
        if isinstance(chain, jax.errors.JaxRuntimeError | ValueError) and str(chain).startswith(_LOST):
            return chain
        chain = chain.__cause__ or chain.__context__
    return None


def _asked_for(processes: Processes) -> bool:
    given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(processes, name) is not None]
    if processes.coordinator not in (None, "auto"):
        if len(given) < 3:
            missing = "process_id" if processes.process_id is None else "num_processes"
            raise UserError("HOST:PORT needs num_processes and process_id beside it; give all three.", missing)
        if not processes.coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"{processes.coordinator!r} names no port; give HOST:PORT.", "coordinator")
        if not 0 <= (processes.process_id or 0) < (processes.num_processes or 1):
            raise UserError(f"{processes.process_id} is none of {processes.num_processes}; count from 0.", "process_id")
        return True
    if given and processes.coordinator is None:
        raise UserError("it belongs to a coordinator HOST:PORT; give all three or none.", given[0])
    counts = [int(os.environ[name]) for name in _COUNTS if os.environ.get(name, "").isdecimal()]
    hosts = [len(os.environ[name].split(",")) for name in _HOSTS if name in os.environ]
    return processes.coordinator == "auto" or max([1, *counts, *hosts]) > 1


def _watch_others(left: threading.Event) -> None:
    """Gives signs of life, and ends this process with one line when another gives none, for which all else may wait for ever."""
    # The store that JAX's processes share has no public door; and devices are not touched here, ahead of the run itself.
    store: Any = global_state.client
    own = global_state.process_id
    seen: dict[str, tuple[str, float]] = {}
    for count in itertools.count():
        left.wait(_SIGN_EVERY)
        store.key_value_set(f"{_SIGNS}/{own}", "left" if left.is_set() else str(count), allow_overwrite=True)
        if left.is_set():
            return
        now = time.monotonic()
        for name, sign in store.key_value_dir_get(_SIGNS):
            if seen.get(name, ("", 0))[0] != sign:
                seen[name] = sign, now
        for name, (sign, since) in seen.items():
            if sign != "left" and now - since > _LOST_AFTER:
                other = name.rpartition("/")[2]
                end(f"Error: process {own}: process {other} of the run is lost; see what it said, start all again and resume.")


def _join(processes: Processes) -> None:
    try:
        jax.distributed.initialize(
            None if processes.coordinator == "auto" else processes.coordinator,
            processes.num_processes,
            processes.process_id,
            initialization_timeout=_WAIT_FOR_ALL,
            heartbeat_timeout_seconds=_JAX_LOST_AFTER,
            shutdown_timeout_seconds=_WAIT_FOR_ALL,  # process 0 writes what was learned meanwhile
        )
    except Exception as error:  # clusters, sockets and JAX raise whatever they raise
        raise UserError(
            f"the run's processes did not find one another ({reason_of(error)}); "
            "start all of them, and give each coordinator, num_processes and process_id.",
            "coordinator",
        ) from None
