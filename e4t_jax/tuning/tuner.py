"""Tuning as a service: pictures come one by one, from any thread, at any time, and each is answered with its concept.

    with Tuner(load_domain("creatures")) as tuner:
        concept = tuner.submit("venus.png").result()

    submit → read ahead → wait for others, at most a moment → one call of 1, 2, 4, … pictures → concepts

On a CPU, whose cores take concepts one by one, each core takes the next picture as soon as it has done its last instead.
All sizes of calls are compiled, and have run once, before the first picture. A call that is not full is filled up with copies of
its last picture, as long as that wastes little. A concept depends on its picture alone (`personalise`), not on who came with it.
"""

from __future__ import annotations

import collections
import itertools
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from e4t_jax.checks import Between, Whole, check_range
from e4t_jax.concept import Concept
from e4t_jax.data.images import PictureLike
from e4t_jax.domain import Domain, name_of
from e4t_jax.tuning.batching import Batch, fitted_lanes
from e4t_jax.tuning.personalise import PictureInput, personalise
from e4t_jax.tuning.results import Outcome
from e4t_jax.tuning.tune import TuneSettings

_AHEAD = 64  # pictures that are read and wait; more are read when there is room
_MAX_BATCH, _MAX_WAIT = Whole(1, 65_536), Between(0, 3600)
_FULL = 0.75  # of a call are pictures, and no filling, or a smaller one is made


class _Waiting(NamedTuple):
    """A picture that is read, and to whom its concept is owed."""

    owed: Future[Concept]
    outcome: Outcome[Concept]
    own: PictureInput
    since: float


class Tuner:
    """A queue of pictures before one domain, tuned with the same settings, several in one call when they come close together.

    Args:
        domain: The domain that pictures are tuned in.
        settings: How concepts are tuned; `TuneSettings()` where not given.
        caption: What the pictures show around `*s`, as in `Domain.tune`; where not given, the base reads it off each picture.
        max_batch: Pictures in one call; where not given, as many as a device computes at the same time, so that no picture
            waits in a call for others to be done.
        max_wait: Seconds that a picture waits for others while the devices are free.
        changes: Single fields of `settings`: `Tuner(domain, steps=5)`.

    Leaving the `with` block answers all that wait, or cancels them when an error leaves it.

    Errors: `UserError` for settings out of range, a caption without the placeholder, and too little memory for a single picture.
    """

    def __init__(
        self,
        domain: Domain,
        settings: TuneSettings | None = None,
        *,
        caption: str | None = None,
        max_batch: int | None = None,
        max_wait: float = 0.01,
        **changes: Any,
    ):
        check_range("max_batch", max_batch, _MAX_BATCH)
        check_range("max_wait", max_wait, _MAX_WAIT)
        self._tuning, self._max_wait = domain.tuning(settings, **changes), max_wait
        self._caption = caption = self._tuning.recipe.caption if caption is None else caption
        self._tokens: Any = None if caption is None else tuple(domain.tokenize([caption]))
        example = self._tuning.example(self._tokens)
        shared = self._tuning.shared(reads=caption is None)
        lanes = fitted_lanes(personalise, shared, example, max_batch, lower="batch_size", static=self._tuning.traced_from)
        for program in itertools.chain(*lanes):
            program.run([example])
        self._free: queue.LifoQueue[list[Batch]] = queue.LifoQueue()  # lanes that have no call just now; the last is still warm
        for programs in lanes:
            self._free.put(programs)
        self._sizes = [program.size for program in lanes[0]]
        self._numbers = itertools.count()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._cancelled = False
        # One thread reads: pictures keep their order. Every lane has one call at a time.
        self._reader, self._caller = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(len(lanes), "tune")

    @property
    def sizes(self) -> list[int]:
        """How many pictures a call may hold: a program is compiled for each."""
        return list(self._sizes)

    def submit(self, image: PictureLike, name: str | None = None) -> Future[Concept]:
        """Returns at once with the future of a picture's concept: what `Domain.tune` makes of it with the same settings.

        The future raises `UserError` for a picture that cannot be read or tuned; it may be cancelled as long as the picture waits.

        Args:
            image: A file, a PIL picture or an array, as in `Domain.tune`.
            name: The concept's; a file lends its own where none is given.

        Errors: `RuntimeError` after `close`.
        """
        owed: Future[Concept] = Future()
        self._reader.submit(self._read, owed, image, name or name_of(image, next(self._numbers)))
        return owed

    def close(self, *, cancel: bool = False) -> None:
        """Answers all that wait, or cancels them, and ends; no more pictures are taken.

        Args:
            cancel: Cancel the pictures that wait instead of tuning them.

        Errors: none.
        """
        self._cancelled = self._cancelled or cancel
        self._reader.shutdown()
        self._caller.shutdown()

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(cancel=kind is not None)

    def _read(self, owed: Future[Concept], image: PictureLike, name: str) -> None:
        if self._cancelled:
            owed.cancel()
        if owed.cancelled():
            return
        try:
            outcome, own = self._tuning.read(image, name, self._caption, self._tokens)
            if own is None:
                raise outcome.error or AssertionError(name)
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) < _AHEAD)
                self._waiting.append(_Waiting(owed, outcome, own, time.monotonic()))
                self._changed.notify_all()
            self._caller.submit(self._call)  # a call for every picture; those that find none waiting have nothing to do
        except Exception as error:  # whatever it is: nobody else would tell the one who waits
            if owed.set_running_or_notify_cancel():
                owed.set_exception(error)

    def _call(self) -> None:
        """Tunes as many of those that wait as fit into one call."""
        programs = self._free.get()
        try:
            self._answer(*self._gather(programs))
        finally:
            self._free.put(programs)

    def _answer(self, program: Batch, waited: Sequence[_Waiting]) -> None:
        batch = [one for one in waited if one.owed.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            made = program.run([one.own for one in batch])
            outcomes = [self._tuning.concept(one.outcome, each) for one, each in zip(batch, made, strict=True)]
        except Exception as error:  # of the device
            for one in batch:
                one.owed.set_exception(error)
            return
        for one, outcome in zip(batch, outcomes, strict=True):
            if outcome.error is not None:
                one.owed.set_exception(outcome.error)
            else:
                one.owed.set_result(outcome.unwrap())

    def _gather(self, programs: Sequence[Batch]) -> tuple[Batch, list[_Waiting]]:
        with self._changed:
            if self._waiting:
                left = self._waiting[0].since + self._max_wait - time.monotonic()
                self._changed.wait_for(lambda: len(self._waiting) >= programs[-1].size, timeout=max(left, 0))
            if self._cancelled:
                for one in self._waiting:
                    one.owed.cancel()
            count = len(self._waiting)
            program = programs[self._sizes.index(call_size(count, self._sizes))]
            batch = [self._waiting.popleft() for _ in range(min(count, program.size))]
            self._changed.notify_all()
        return program, batch


def call_size(count: int, sizes: Sequence[int]) -> int:
    """The largest of some sizes that `count` pictures fill well enough; the smallest where none is."""
    return max([size for size in sizes if _FULL * size <= count], default=min(sizes))
