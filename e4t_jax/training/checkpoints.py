"""Checkpoints of a run: the state, the run's facts and a checksum of every file; nothing is deleted before it is replaced.

They are written while the run goes on, every process its own part. A checkpoint counts from when its checksums are there.

A run goes on only from a checkpoint of its own: facts that the weights depend on (base, data, seed, rates) are stored beside
the state and compared; of those that `may_change` (steps, batch, devices), a change is said. A checkpoint that is incomplete or
was changed is passed over for the one before it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from e4t_jax.errors import Stopped, UserError, reason_of
from e4t_jax.storage import check_writable, file_digest, locked, read_json, to_json, write_file
from e4t_jax.training.processes import agreed, is_first

_FACTS = "facts.json"
_DIGESTS = "digests.json"
_INCOMPLETE = "it is incomplete"
_KEPT = 2


class Checkpoints:
    """The checkpoints of one run in `folder`; `facts` are the run's own, plain values of JSON.

    A run that is new refuses a folder that holds another's checkpoints; `resume` goes on from the newest that is sound, or
    starts where there is none yet. `say` is told of what was passed over. One process at a time has the folder.

    Errors: `UserError` when the folder cannot be written, holds a run and `resume` is not asked for, holds one of other facts, or
    is another process's.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        resume: bool,
        may_change: Collection[str] = (),
        say: Callable[[str], None] = warnings.warn,
    ):
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        if is_first():
            check_writable(Path(folder), argument="work")
            self.folder.mkdir(parents=True, exist_ok=True)
        self.facts = json.loads(to_json(facts))
        self.may_change = frozenset(may_change)
        self.say = say
        self._passed_over: set[int] = set()
        self._unsealed: int | None = None  # the step that is being written
        with contextlib.ExitStack() as held:
            if is_first():
                if not held.enter_context(locked(self.folder, wait=False)):
                    raise UserError(f"another process works in {self.folder}; let it end, or give another folder.", "work")
                self._check_run(resume)
            with _one_line(f"Cannot open the checkpoints in {self.folder}", "give another work folder"):
                self._manager = ocp.CheckpointManager(
                    self.folder,
                    # What a killed process left half-written goes: it was never a checkpoint.
                    options=ocp.CheckpointManagerOptions(
                        max_to_keep=_KEPT, enable_async_checkpointing=True, cleanup_tmp_directories=True
                    ),
                )
            self._held = held.pop_all()

    def _check_run(self, resume: bool) -> None:
        file = self.folder / _FACTS
        steps = sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()), reverse=True)
        if steps and not resume:
            raise UserError(
                f"{self.folder} holds a run already, at step {steps[0]}; go on with it (--resume, in Python resume=True), "
                "or give another folder.",
                "work",
            )
        if resume and (steps or file.exists()):
            # A run of which nothing is known may be any run.
            self._compare(read_json(file, "give another work folder"))
        write_file(file, to_json(self.facts))

    def _compare(self, before: Mapping[str, Any]) -> None:
        for name in sorted({*before, *self.facts}):
            was, now = before.get(name), self.facts.get(name)
            if was != now and name in self.may_change:
                self.say(f"The run in {self.folder} began with {name} = {was!r} and goes on with {now!r}.")
            elif was != now:
                raise UserError(
                    f"{self.folder} holds a run with {name} = {was!r}, and {now!r} is asked for now; "
                    "ask for the same, or give another folder.",
                    "work",
                )

    def latest(self) -> int | None:
        """The newest step that is saved, damaged ones apart."""
        self.wait()
        return max((step for step in self._manager.all_steps() if step not in self._passed_over), default=None)

    def restore(self, like: Any) -> Any | None:
        """The newest sound state, as a tree like `like`, which may lie on other devices than those it was saved from; None where
        none was ever written whole.

        Errors: `UserError` when none of the checkpoints there is sound.
        """
        import orbax.checkpoint as ocp

        damaged = 0
        for step in sorted(self._manager.all_steps(), reverse=True):
            # One process reads the files, and all do as it says.
            fault = self._fault(step) if is_first() else None
            kind = agreed(0 if fault is None else 1 if fault == _INCOMPLETE else 2)
            damaged += kind == 2
            if kind and fault is None:
                fault = "process 0 says so"
            if fault is None:
                with _quiet():
                    try:
                        return self._manager.restore(step, args=ocp.args.StandardRestore(like))
                    except Exception as error:  # Orbax and its stores raise whatever the damage makes them raise
                        fault = reason_of(error)
                        damaged += 1
            self._passed_over.add(step)
            self.say(f"The checkpoint of step {step} in {self.folder} is passed over: {fault}.")
        if damaged:
            raise UserError(f"{self.folder} holds no sound checkpoint; delete the folder and start again.", "work")
        return None

    def save(self, step: int, state: Any) -> None:
        """Begins to save a state, which may change as soon as this returns; the one before is whole by then.

        Errors: `UserError` when it, or the one before, cannot be written.
        """
        import orbax.checkpoint as ocp

        self.wait()
        with self._writing():
            # Those passed over are of no use, and newer than what is to be saved: the store takes no step before its last.
            for damaged in sorted(self._passed_over & set(self._manager.all_steps())):
                self._manager.delete(damaged)
            if step in self._manager.all_steps():
                return
            if not self._manager.save(step, args=ocp.args.StandardSave(state)):
                raise RuntimeError(f"it holds a step after {step}")
            self._unsealed = step

    def seal(self) -> None:
        """Where what is being written has reached the disk, notes its checksums; without waiting for it.

        Errors: `UserError` when it could not be written.
        """
        if self._unsealed is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Errors: `UserError` when it could not be written.
        """
        if self._unsealed is None:
            return
        step, self._unsealed = self._unsealed, None
        with self._writing():
            self._manager.wait_until_finished()
            digests = self._digests(step) if is_first() else {}
        if is_first():
            write_file(self.folder / str(step) / _DIGESTS, to_json(digests))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What fails while a checkpoint is written is one line, and leaves nothing half-written."""
        with (
            contextlib.ExitStack() as half_written,
            _one_line(f"Cannot write a checkpoint to {self.folder}", "free some space and resume"),
        ):
            # It may be what fills the disk.
            half_written.callback(self._clear_temporary)
            yield
            half_written.pop_all()

    def close(self) -> None:
        """Frees what the store holds open, and the folder."""
        with self._held:
            try:
                self.wait()
            finally:
                self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Stopped) and jax.process_count() > 1:
            self._held.close()  # but not the store: it would wait for the others, who may be gone
        else:
            self.close()

    def _clear_temporary(self) -> None:
        for path in self.folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _digests(self, step: int) -> dict[str, str]:
        root = self.folder / str(step)
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != _DIGESTS)
        return {str(path.relative_to(root)): file_digest(path) for path in files}

    def _fault(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, or None."""
        path = self.folder / str(step) / _DIGESTS
        if not path.exists():
            return _INCOMPLETE
        try:
            promised = read_json(path, "")
        except UserError:
            return f"{_DIGESTS} is damaged"
        found = self._digests(step)
        wrong = sorted(name for name in {*promised, *found} if promised.get(name) != found.get(name))
        if not promised:
            return f"{_DIGESTS} is empty"
        return f"{wrong[0]} is missing or was changed" if wrong else None


@contextlib.contextmanager
def _one_line(what: str, mend: str):
    """Whatever the store raises, as a `UserError`."""
    with _quiet():
        try:
            yield
        except Exception as error:
            reason = reason_of(error, 160)
            raise UserError(f"{what} ({reason}); {mend}.", "work") from None


@contextlib.contextmanager
def _quiet():
    """Orbax logs an error it raises, too; the one line is the exception's."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
