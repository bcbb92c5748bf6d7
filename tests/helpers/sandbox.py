"""Commands called in process on a tiny world, with all that is compiled replaced by what costs nothing: for thousands of odd calls.

What is left is what a mistake meets: reading the command line, checking, reading and writing files.
"""

import contextlib
import dataclasses
import functools
import io
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from public_checkpoints import HAS_TORCH, write_checkpoints

from e4t_jax import bases
from e4t_jax import domain as domain_module
from e4t_jax.bases import StableDiffusion, load_base, open_base
from e4t_jax.cli import base, cache, demo, evaluate, export, export_domain, generate, import_reference, judges, pretrain, tune
from e4t_jax.cli.run import run
from e4t_jax.creatures.judging import judge_stages
from e4t_jax.creatures.learning import base_stages
from e4t_jax.errors import UserError
from e4t_jax.files import domain_files
from e4t_jax.interop import diffusers
from e4t_jax.pretraining import encode_once, settings, step
from e4t_jax.pretraining.encode_once import CacheSettings
from e4t_jax.storage import file_digest
from e4t_jax.testing import World, write_tiny_world
from e4t_jax.tuning.personalise import Personalised
from e4t_jax.tuning.tune import start

COMMANDS = {
    "tune": tune.main,
    "generate": generate.main,
    "export": export.main,
    "pretrain": pretrain.main,
    "cache": cache.main,
    "evaluate": evaluate.main,
    "demo": demo.main,
    "train-base": base.main,
    "train-judges": judges.main,
    **({"import-reference": import_reference.main, "export-domain": export_domain.main} if HAS_TORCH else {}),
}


class Reached(BaseException):
    """Hours of training or measuring would begin here: every argument was found right."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call ended: 0 and nothing said, one line, or a traceback."""

    status: int
    said: str = ""
    traceback: str = ""

    @property
    def is_one_line(self):
        return self.status == 1 and self.said.startswith("Error: ") and len(self.said.splitlines()) == 1 and not self.traceback


class Case(NamedTuple):
    """One input: its kind, what may come of it, the call, what is done to the world before, and what must be true after."""

    kind: str
    may: str  # refused, right or either
    command: str
    arguments: list
    prepare: Callable[[], None] = lambda: None
    holds: Callable[[], bool] = lambda: True


def reach(*_, **__):
    raise Reached


def make_world(folder: Path) -> World:
    """The tiny world, a text, a cache of its pictures, and checkpoints of the public code where PyTorch can write them."""
    world = write_tiny_world(folder)
    encode_once.cache(str(world.base), f"folder:{world.pictures}", folder / "kept", CacheSettings(batch_size=2))
    (folder / "notes.txt").write_text("no picture")
    if HAS_TORCH:
        write_checkpoints(folder, load_base(str(world.base))[0], world.base / "unet" / "diffusion_pytorch_model.safetensors")
    return world


@functools.cache
def _open_base(state, *arguments, **options):
    return open_base(*arguments, **options)


def open_base_once(name, *arguments, **options):
    """Once for every state of the folder's files: reading one takes seconds."""
    files = sorted(path for path in Path(name).rglob("*") if path.is_file()) if os.path.isdir(name) else []
    return _open_base(tuple((str(path), file_digest(path)) for path in files), name, *arguments, **options)


@contextlib.contextmanager
def nothing_compiled():
    """Everything that is compiled, replaced: numbers of the right shapes, drawn from nothing."""

    def over(one, shared, rows, count, *, lower, static=None):
        made = personalise if one is domain_module.personalise else draw
        return ((label, None if own is None else made(shared)) for label, own in rows)

    def personalise(run):
        begun = start(run.method, run.frozen, run.recipe.scope, run.key)
        return Personalised(begun, np.zeros(run.recipe.steps), np.zeros(run.method.base.image_encoder.width))

    def draw(run):
        return np.zeros((len(run.ids), run.method.base.image_size, run.method.base.image_size, 3))

    def compile_step(*_, **__):
        def step(state, weights, rows, key):
            return dataclasses.replace(state, step=jnp.asarray(state.step) + 1), {"loss": np.float32(1)}

        step.lower = lambda *_: SimpleNamespace(compile=lambda: None)
        return step

    def encode_views(base, weights, images, masks, keys, *, views, kept):
        clip = (base.image_encoder.count, base.image_encoder.width)
        shapes = {"latents": base.latent_shape, "clip": clip, "mask": base.latent_shape[:2]}
        return {part: jnp.zeros((len(keys), views, *shape), kept) for part, shape in shapes.items()}

    def constant_word(domain, concept, **_):
        return np.zeros(domain.base.text_width, np.float32)

    patches = [
        (domain_module, "over", over),
        (step, "compile_step", compile_step),
        (step, "tflop_of", lambda *_: None),
        (step, "check_fits", lambda *_, **__: None),
        (encode_once, "encode_views", encode_views),
        (domain_files, "open_base", open_base_once),
        (settings, "open_base", open_base_once),
        (bases, "load_base", lambda *arguments, **options: open_base_once(*arguments, **options)[:2]),
        (evaluate, "load_judges", reach),
        (demo, "load_judges", reach),
        (base_stages, "draw_pictures", reach),
        (base, "climb", reach),
        (judge_stages, "_fit", reach),
        (judge_stages, "records", lambda *_: ({}, {"context": [], "style": []})),
        (judge_stages, "sample_identities", lambda *_: {}),
        (judge_stages, "sample_scenes", lambda *_: {}),
        (judge_stages, "_labelled_batches", lambda *_: iter(())),
        (judge_stages.losses, "scene_labels", lambda *_: {}),
        (judge_stages.losses, "attribute_labels", lambda *_: {}),
        (diffusers, "constant_word", constant_word),
        (StableDiffusion, "feature_width", property(functools.cache(StableDiffusion.feature_width.func))),
    ]
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in patches]
    try:
        for owner, name, instead in patches:
            setattr(owner, name, instead)
        yield
    finally:
        for owner, name, was in before:
            setattr(owner, name, was)


def call(command: str, arguments: list) -> Outcome:
    """A command as the shell would call it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            run(COMMANDS[command], [str(argument) for argument in arguments], f"e4t {command}")
    except Reached:
        return Outcome(0)
    except SystemExit as stop:
        return Outcome(0) if stop.code in (0, None) else Outcome(1, str(stop.code))
    except BaseException:
        return Outcome(1, "", traceback.format_exc())
    return Outcome(0)


def attempt(read, *arguments) -> tuple[object, Outcome]:
    """What a function of the library returns, and how the call ended."""
    try:
        return read(*arguments), Outcome(0)
    except UserError as error:
        return None, Outcome(1, f"Error: {error}")
    except BaseException:
        return None, Outcome(1, "", traceback.format_exc())


def snapshot(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every path below a folder; of files, when they were written and how long they are."""
    found: dict[str, tuple[int, int] | None] = {}
    for root, folders, files in os.walk(folder):
        for name in files:
            stat = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = stat.st_mtime_ns, stat.st_size
        found |= {os.path.join(root, name): None for name in folders}
    return found


def half_written(before: dict, after: dict) -> list[str]:
    """Names that only a write that was broken off leaves."""
    return sorted(path for path in set(after) - set(before) if os.path.basename(path).startswith(".") and path not in before)


def same(one, other) -> bool:
    """Whether two trees of arrays and plain values are equal, number by number."""
    ones, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(ones) == len(others) and all(np.array_equal(a, b) for a, b in zip(ones, others, strict=True))
