"""What every command shares: typed arguments, and one clear line for a user's mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_origin, get_type_hints

import tyro

from e4t_jax.checks import check_ranges
from e4t_jax.cli.help_page import help_page
from e4t_jax.cli.parse_errors import Option, line_of_box, unknown_words
from e4t_jax.cli.streams import ends_with_its_reader, is_unread
from e4t_jax.errors import UserError
from e4t_jax.files.places import local_path
from e4t_jax.machine import is_out_of_memory
from e4t_jax.tuning.compiled_cache import keep_programs

# Settings that a command takes whole, as if their fields were its own.
Inline = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Options that all commands share."""

    example: ClassVar[str] = ""  # of a call, for the help page

    cache: bool = True
    """Keep compiled programs for the next run, in the user's cache folder or $JAX_COMPILATION_CACHE_DIR: it starts sooner."""

    @classmethod
    def with_defaults(cls, arguments: Sequence[str]) -> type[Command]:
        """The options with the defaults that hold for these arguments: the class itself, or one that inherits from it."""
        return cls


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkCommand(Command):
    """Options of the commands that run the networks."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in, and what their kernels lie in; auto: bfloat16 on an accelerator, float32 on a CPU. What learns,
    norms and results are float32."""
    remat: Literal["auto", "none", "blocks"] = "auto"
    """What is computed again for the gradient rather than kept: nothing, or every block of the networks (less memory); auto: blocks
    on an accelerator, nothing on a CPU."""
    attention: Literal["auto", "xla"] = "auto"
    """The platform's own attention kernel where it has one, or the plain form everywhere."""

    def policy(self, on_accelerator: bool | None = None) -> dict[str, str]:
        """How the networks compute, as `load_base` takes it; "auto" is resolved by the devices at hand where not said."""
        import jax

        accelerated = jax.default_backend() != "cpu" if on_accelerator is None else on_accelerator
        dtype, remat = ("bfloat16", "blocks") if accelerated else ("float32", "none")
        return {
            "dtype": dtype if self.dtype == "auto" else self.dtype,
            "remat": remat if self.remat == "auto" else self.remat,
            "attention": self.attention,
        }


@ends_with_its_reader()
def run(main: Callable[[Any], None], arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Reads the command line into `main`'s one dataclass argument and calls it; a mistake ends with one line and status 1."""
    import jax

    from e4t_jax.training.processes import end

    arguments = sys.argv[1:] if arguments is None else arguments
    config_type = get_type_hints(main, include_extras=True)["config"].with_defaults(arguments)
    config = parse(config_type, arguments, program)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"  # a line, without the place in the source
    if config.cache:
        keep_programs()
    try:
        check_ranges(config)
        main(with_local_paths(config))
    except UserError as error:
        end(f"Error: {in_flags(error, config_type)}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        end(f"Error: out of memory; lower {_lowers_memory(config_type)}.")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            raise
        # Whatever no file's own reader or writer foresaw.
        where = f"{str(error.filename)[:200]}: " if error.filename else ""
        end(f"Error: {UserError(f'{where}{error.strerror or error}; check the path and the disk.')}")
    except KeyboardInterrupt:
        end("Stopped.")


def with_local_paths(config: Any) -> Any:
    """A configuration with its paths as `local_path` has them, those in settings that it takes whole among them.

    Errors: `UserError` as `local_path`, naming the field.
    """

    def local(name: str, value: Any) -> Any:
        if isinstance(value, Path):
            return local_path(value, name)
        if isinstance(value, tuple):
            return tuple(local(name, one) for one in value)
        return with_local_paths(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: local(name, value) for name, value in values.items()})


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """What a command line gives for a flag, before it is parsed; the last one counts."""
    found = None
    for index, word in enumerate(arguments):
        if word == flag and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def parse(config_type: type, arguments: Sequence[str] | None, program: str | None) -> Any:
    """The configuration that a command line asks for; what it cannot read ends with one line and status 1, as all mistakes do."""
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        print(help_page(config_type, program or "e4t"))
        sys.exit()
    report = io.StringIO()
    config: Any
    try:
        with contextlib.redirect_stderr(report):
            config, unknown = tyro.cli(
                config_type, description=config_type.__doc__, args=arguments, prog=program, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        sys.exit(f"Error: {line_of_box(report.getvalue(), _options(config_type, arguments))}; see --help.")
    if unknown:
        sys.exit(f"Error: {unknown_words(unknown, _options(config_type, arguments))}; see --help.")
    return config


def in_flags(error: UserError, config_type: type) -> str:
    """The message with the argument as this command's flag, where it has one."""
    if error.argument not in _field_names(config_type):
        return str(error)
    return f"--{error.argument.replace('_', '-')}: {error.message}"


def _options(config_type: type, arguments: Sequence[str] | None) -> list[Option]:
    """The command's options as a mistaken command line is told of them."""
    found: list[Option] = []
    hints = get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found += _options(kind, arguments)
            continue
        flag = f"--{field.name.replace('_', '-')}"
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        lacks = required and value_of(sys.argv[1:] if arguments is None else arguments, flag) is None
        found.append(Option(flag, takes_many=get_origin(kind) is tuple, lacks=lacks))
    return found


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
