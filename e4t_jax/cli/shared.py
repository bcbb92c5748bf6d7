"""What every command shares: typed arguments, one clear line for a user's mistake, progress bars, kept compiled programs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import tyro
from tqdm import tqdm

from e4t_jax.checks import check_ranges
from e4t_jax.errors import UserError

# Settings that a command takes whole, as if their fields were its own.
Inline = tyro.conf.arg(name="")
_CACHE_BYTES = 2 * 2**30  # the programs used longest ago make room
_UNFINISHED_FOR = 60  # seconds
_BOX = "╭╮╰╯│─ "
# What the collective operations of virtual CPU devices wait for each other, in seconds: on a busy machine one falls behind.
_PATIENCE = {
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 600,
    "xla_cpu_collective_call_terminate_timeout_seconds": 36000,
    "xla_cpu_collective_timeout_seconds": 36000,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options that all commands share."""

    cache: bool = True
    """Keep compiled programs for the next run, in the user's cache folder or $JAX_COMPILATION_CACHE_DIR: it starts sooner."""

    @classmethod
    def with_defaults(cls, arguments: Sequence[str]) -> type[Command]:
        """The options with the defaults that hold for these arguments: the class itself, or one that inherits from it."""
        return cls


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkCommand(Command):
    """Options of the commands that run the networks."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; weights, norms and results stay float32."""


def keep_compiled_programs() -> None:
    """Compilation takes longer than tuning: what one run compiled, the next one reads."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "e4t-jax" / "compiled"
    forget_unfinished_programs(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)


def forget_unfinished_programs(folder: Path) -> None:
    """Removes what a process left that was killed while it kept a program: JAX would warn of it ever after, and keep no other.

    Such a program has no file that says when it was last used, which is written after it; one of the last minute may get it yet.
    """
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            stamp = path.with_name(f"{path.name.removesuffix('-cache')}-atime")
            if not stamp.exists() and time.time() - path.stat().st_mtime > _UNFINISHED_FOR:
                path.unlink()


def run(main: Callable[[Any], None], arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Reads the command line into `main`'s one dataclass argument and calls it; a mistake ends with one line and status 1."""
    import jax

    from e4t_jax.training.processes import end

    arguments = sys.argv[1:] if arguments is None else arguments
    config_type = get_type_hints(main, include_extras=True)["config"].with_defaults(arguments)
    config = parse(config_type, arguments, program)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"  # a line, without the place in the source
    if config.cache:
        keep_compiled_programs()
    try:
        check_ranges(config)
        main(config)
    except UserError as error:
        end(f"Error: {in_flags(error, config_type)}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        end(f"Error: out of memory; lower {_lowers_memory(config_type)}.")
    except OSError as error:
        # Whatever no file's own reader or writer foresaw.
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        end(f"Error: {UserError(f'{where}{error.strerror or error}; check the path and the disk.')}")
    except KeyboardInterrupt:
        end("Stopped.")


def parse(config_type: type, arguments: Sequence[str] | None, program: str | None) -> Any:
    """The configuration that a command line asks for; what it cannot read ends with one line and status 1, as all mistakes do."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config_type, description=config_type.__doc__, args=arguments, prog=program)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        sys.exit(f"Error: {_one_line(said.getvalue())}; see --help.")


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """What a command line gives for a flag, before it is parsed; the last one counts."""
    found = None
    for index, word in enumerate(arguments):
        if word == flag and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _one_line(box: str) -> str:
    """What tyro says in a box of many lines, without the help of each option."""
    lines = [line.strip(_BOX) for line in box.splitlines()[1:]]
    lines = [line for line in lines if line]
    for index, line in enumerate(lines):
        if line.startswith(("Argument helptext", "For full helptext")):
            lines = lines[:index]
            break
    if "Unrecognized" in "".join(lines):
        at = next(index for index, line in enumerate(lines) if "Unrecognized" in line)
        unknown = [word for line in lines[at:] for word in re.findall(r"(?<!\S)--?[\w-]+", line.partition(":")[2] or line)]
        return f"{' and '.join(unknown) or 'a word'} is unknown to this command"
    if lines and lines[0].startswith("Missing"):
        missing = re.findall(r"(?m)^--[\w-]+", "\n".join(lines))
        return f"{' and '.join(missing)} must be given"
    lines = [line for line in lines if line.strip("-")]  # where no box is drawn, rules are of hyphens
    text = re.sub(r"invalid literal for (\w+)\(\)[^:]*: ", r"no \1: ", " ".join(lines))
    return text.removeprefix("Error parsing ")[:300] or "the command line cannot be read"


def in_flags(error: UserError, config_type: type) -> str:
    """The message with the argument as this command's flag, where it has one."""
    if error.argument not in _field_names(config_type):
        return str(error)
    return f"--{error.argument.replace('_', '-')}: {error.message}"


def _field_names(config_type: type) -> list[str]:
    """The command's options, those of settings that it takes whole among them."""
    hints = get_type_hints(config_type)
    names: list[str] = []
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        names += _field_names(kind) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else [field.name]
    return names


def _lowers_memory(config_type: type) -> str:
    """The flags of this command that memory grows with."""
    names = _field_names(config_type)
    flags = [name for name in ("batch_size", "concepts", "images", "prompts") if name in names]
    return " or ".join(f"--{flag.replace('_', '-')}" for flag in flags) or "the size of the model"


@contextlib.contextmanager
def stop_on_request() -> Iterator[Callable[[], bool]]:
    """Yields what tells whether SIGTERM, a cluster's request to end, came meanwhile; a second one ends the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no other may say how signals are handled
        yield asked.is_set
        return

    def note(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def names_of(paths: Sequence[Path], argument: str, *, empty: str, named: str) -> list[str]:
    """The names of files without their endings, which are to be those of other files.

    Errors: `UserError` when there is none (`empty` says what to give), or two are the same (`named` says what is named so).
    """
    names = [path.stem for path in paths]
    if not names:
        raise UserError(empty, argument)
    if len(set(names)) < len(names):
        raise UserError(f"two files have one name, and {named}; rename one.", argument)
    return names


def progress(items: Iterable, description: str, **options: Any) -> tqdm:
    """A progress bar with rate and time left, on the error stream."""
    return tqdm(items, desc=description, mininterval=1.0, dynamic_ncols=True, **options)


def all_done(failed: Mapping[str, UserError], whole: int, what: str) -> None:
    """Ends with the errors of single `what` ("pictures"), if there were any, after all others are done.

    Errors: the one error there was, or a `UserError` that counts them.
    """
    if len(failed) == 1:
        raise next(iter(failed.values()))
    for name, error in failed.items():
        say(f"{name}: {error}")
    if failed:
        raise UserError(f"{len(failed)} of {whole} {what} failed, for the reasons above; mend them, and --resume does the rest.")


def steps_bar(description: str) -> Callable[[range], tqdm]:
    """What wraps the steps of a training, which may begin in the middle."""
    return lambda steps: progress(steps, description, total=steps.stop, initial=steps.start)


def say(line: str) -> None:
    """A line on the error stream, beside the progress bars."""
    tqdm.write(line, file=sys.stderr)


def use_all_cores() -> None:
    """One JAX device a core where there is no accelerator: two cores compute a split batch 1.6 times as fast that way."""
    import jax

    from e4t_jax.machine import core_count

    flags = os.environ.get("XLA_FLAGS", "")
    waits = [f"--{name}={seconds}" for name, seconds in _PATIENCE.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *waits]).strip()
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", core_count())
