"""Rows read ahead of their use, in threads of this process or in processes beside it; the order does not depend on which."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grain.python as grain

_THREADS = 2


def read_ahead(rows: grain.MapDataset, workers: int, buffered: int) -> Generator[Any, None, None]:
    """The rows in their order, read by `workers` processes, or by two threads of this one where that is 0; up to `buffered` wait.

    Decoding holds Python's lock for a good part of its time, so threads keep hardly two cores busy; processes cost some seconds to
    start, and 300 MB each; closing the generator ends them.
    """
    import grain.python as grain

    if not workers:
        ahead = iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=buffered)))
    else:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain's processes ask for flags, which programs of Abseil parse
            flags.FLAGS.mark_as_parsed()
        each = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, buffered // workers))
        ahead = iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(each))
    try:
        yield from ahead
    finally:
        ahead.close()
