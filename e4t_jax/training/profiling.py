"""A trace of a few steps, by JAX's profiler: TensorBoard's plug-in, XProf and Perfetto show it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from e4t_jax.training.loop import Step

_FIRST, _LAST = 3, 5  # of the steps after a start: the first compiles, and the second still warms up


@contextlib.contextmanager
def profiled(step: Step, folder: Path | None) -> Iterator[Step]:
    """The same step, whose third to fifth call are traced into `folder`/plugins/profile; as it is where that is None."""
    if folder is None:
        yield step
        return
    calls, tracing = 0, False

    def traced(*arguments: Any) -> Any:
        nonlocal calls, tracing
        calls += 1
        if calls == _FIRST:
            jax.profiler.start_trace(folder)
            tracing = True
        if not tracing:
            return step(*arguments)
        with jax.profiler.StepTraceAnnotation("step", step_num=calls):
            made = step(*arguments)
        if calls == _LAST:
            jax.block_until_ready(made)  # what is asked for is not done yet
            jax.profiler.stop_trace()
            tracing = False
        return made

    try:
        yield traced
    finally:
        if tracing:  # a run of fewer steps
            jax.profiler.stop_trace()
