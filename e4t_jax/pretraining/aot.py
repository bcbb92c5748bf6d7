"""Programs compiled ahead of time for TPUs that are not there: what they need and move, before any is rented.

Needs the compiler alone: `pip install "e4t-jax[tpu]"`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from e4t_jax.bases import Base, Params
from e4t_jax.domain import Domain
from e4t_jax.errors import UserError, reason_of
from e4t_jax.objective import LossWeights, Method, make_method
from e4t_jax.pretraining.encode_once import READ_BY_RUNS
from e4t_jax.pretraining.step import PretrainSettings, compile_step, frozen_weights, init_trainable
from e4t_jax.sample import DrawnConcept, SampleSettings, draw_concept
from e4t_jax.training import optimizers
from e4t_jax.training.loop import init_state
from e4t_jax.training.parallel import Layout, layout
from e4t_jax.tuning.batching import lowered
from e4t_jax.tuning.personalise import personalise
from e4t_jax.tuning.tune import TuneSettings, start

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "f64": 8}
_WORD = "photo"  # the domain's, where only shapes matter: one token of every tokenizer
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU slice such as "v5e:4x4", none of which needs to exist.

    Errors: `UserError` without libtpu, and for a name that it does not know.
    """
    from jax.experimental import topologies

    # It would ask a machine on Google Cloud what it is, and keep others from compiling meanwhile: no TPU is taken here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # the plugin raises whatever it raises
        raise UserError(
            f"{name!r} is not to be compiled for ({reason_of(error)}); "
            'give KIND:ROWSxCOLUMNS such as v5e:4x4, and install the compiler: pip install "e4t-jax[tpu]".',
            "topology",
        ) from None


def compile_pretraining(
    devices: list[Any], model: tuple[Base, Params], per_device_batch: int, settings: PretrainSettings, *, cached: bool = False
) -> jax.stages.Compiled:
    """The very step that `pretrain` runs with these settings, on pictures or on a cache's rows, compiled for `devices`; nothing is
    allocated. `model` is a base and the shapes of its weights (`bases.load_base_shapes`).

    Errors: `UserError` for settings that do not fit the devices, and when the program does not fit their memory.
    """
    where = layout(settings.parallel, settings.fsdp, devices)
    where.check_divides(per_device_batch * len(devices), settings.accumulate)
    base, params = model
    if cached:
        params = {part: params[part] for part in READ_BY_RUNS}
    method = make_method(base, _WORD)
    tx = optimizers.pretraining(settings.learning_rate, settings.steps)
    state = jax.eval_shape(lambda: init_state(init_trainable(method, jax.random.key(0)), tx))
    step: Any = compile_step(method, tx, LossWeights(settings.regularisation), where, accumulate=settings.accumulate)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = key if settings.parallel == "pmap" else where.shapes(key)
    rows = _rows(method, where, per_device_batch, cached)
    return compiled(step.lower(where.shapes(state), where.shapes(frozen_weights(params)), rows, key))


def domain_shapes(model: tuple[Base, Params]) -> Domain:
    """A domain on that base, of weights' shapes as all else in it: what its calls would compile can be lowered."""
    base, params = model
    learned = jax.eval_shape(lambda: init_trainable(make_method(base, _WORD), jax.random.key(0)))
    assert learned.factors is not None
    return Domain("", _WORD, base, params, encoder=learned.encoder, factors=learned.factors)


def lower_tune(domain: Domain, settings: TuneSettings, devices: Sequence[Any], each: int = 1) -> jax.stages.Lowered:
    """The very program that `Domain.tune` runs for `each` bare pictures a device: encoders, captions, steps and fold."""
    tuning = domain.tuning(settings)
    return lowered(personalise, tuning.shared(reads=True), tuning.example(), devices, each)


def lower_generate(
    domain: Domain, settings: TuneSettings, prompts: Sequence[str], devices: Sequence[Any], each: int = 1
) -> jax.stages.Lowered:
    """The very program that `Domain.generate` runs for `each` concepts of a scope a device, in these prompts; VAE included."""
    method, recipe = domain.method, domain.tuning(settings).recipe
    trainable = jax.eval_shape(lambda frozen: start(method, frozen, recipe.scope, jax.random.key(0)), domain.frozen)
    folded: Any = jax.ShapeDtypeStruct((domain.base.image_encoder.width,), np.float32)
    return lowered(draw_concept, domain.drawing(prompts, SampleSettings()), DrawnConcept(trainable, folded), devices, each)


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """Errors: `UserError` when a program does not fit the memory of the devices that it was lowered for."""
    try:
        return program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"{reason_of(error, 200)}; lower it.", "per_device_batch") from None


def _rows(method: Method, where: Layout, per_device_batch: int, cached: bool) -> dict[str, Any]:
    """The shapes of a global batch, of pictures or of a cache."""
    count, size, length = per_device_batch * where.mesh.size, method.base.image_size, method.empty_ids.shape[1]
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if not cached:
        shapes = {"image": ((count, size, size, 3), np.float32), "mask": ((count, size, size), np.float32)}
    else:
        latents, clip = method.base.latent_shape, (method.encoder.clip_layers, method.encoder.clip_width)
        kept = {"latents": latents, "clip": clip, "mask": latents[:2]}
        shapes = {name: ((count, *shape), np.float16) for name, shape in kept.items()}
    shapes |= {
        "ids": ((count, length), np.int32),
        "placeholder": ((count, length), np.bool_),
    }
    return where.row_shapes({name: jax.ShapeDtypeStruct(*one) for name, one in shapes.items()})


def figures(compiled: jax.stages.Compiled, devices: int, per_device_batch: int) -> dict[str, float]:
    """What one device needs and does in a step: peak memory, and of it the weights and moments that lie there between steps; per
    image, floating-point operations and bytes of memory moved, as the compiler counts them; and what it gets from others."""
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and cost is not None and text is not None  # a compiler that tells nothing is none of TPU's
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "devices": devices,
        "hbm_gb": round((held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30, 3),
        "weights_gb": round(weight_bytes(compiled) / 2**30, 3),
        "tflop_per_image": round(cost["flops"] / per_device_batch / 1e12, 3),
        "gb_accessed_per_image": round(cost["bytes accessed"] / per_device_batch / 1e9, 3),
        "all_reduce_mb": round(collective_bytes(text, "all-reduce") / 1e6, 3),
        "all_gather_mb": round(collective_bytes(text, "all-gather") / 1e6, 3),
    }


def weight_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of weights and moments that a device holds between steps: of the state, and of what is given beside it."""
    shapes, shardings = (
        jax.tree.leaves(tree[0][:2], is_leaf=lambda one: one is None) for tree in (compiled.args_info, compiled.input_shardings)
    )
    held = [(shape, sharding) for shape, sharding in zip(shapes, shardings, strict=True) if sharding is not None]  # what is read
    return sum(int(np.prod(sharding.shard_shape(shape.shape))) * shape.dtype.itemsize for shape, sharding in held)


def collective_bytes(program: str, kind: str) -> int:
    """Bytes of the results of all operations of a kind ("all-reduce") in a compiled program's text."""
    total = 0
    for line in program.splitlines():
        result, found, _ = line.partition(f" {kind}(")
        started, found_start, _ = line.partition(f" {kind}-start(")
        if not found and not found_start:
            continue
        shapes = _SHAPE.findall((result if found else started).partition(" = ")[2])
        # The first part of a gathering in two holds what goes in, too, and before what comes out.
        if found_start and kind == "all-gather":
            shapes = shapes[len(shapes) // 2 :]
        total += sum(
            _BYTES.get(dtype, 4) * int(np.prod([int(side) for side in sides.split(",") if side])) for dtype, sides in shapes
        )
    return total
