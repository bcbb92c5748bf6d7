"""Compiles a program for TPUs that are not there: the memory it needs and the bytes it moves, as one line of JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Literal

from e4t_jax.checks import BatchSize, Count, Whole
from e4t_jax.cli.run import NetworkCommand
from e4t_jax.pretraining.step import PretrainSettings
from e4t_jax.tuning.tune import TuneSettings


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Compile a program ahead of time for TPUs; the last line is JSON: devices, hbm_gb, tflop_per_image, …"""

    example = "e4t aot --topology v5e:4x4 --what pretrain --base random:sd15 --per-device-batch 8"

    topology: str = "v5e:4x4"
    """The slice to compile for, KIND:ROWSxCOLUMNS: v5e:4x4, v5p:2x2x2, v6e:16x16."""
    base: str = "random:sd15"
    """Base model, as `e4t pretrain` takes it; random:sd15 and random:sd21 are not even drawn."""
    image_encoder: str | None = None
    """CLIP's, as `e4t pretrain` takes it."""
    clip_features: str = "layers"
    """What of CLIP's the encoder sees: layers or tokens."""
    data: Literal["pictures", "cache"] = "pictures"
    """What the step reads: pictures, with VAE and CLIP in the step, or rows that `e4t cache` wrote, with neither."""
    what: Literal["pretrain", "tune", "generate"] = "pretrain"
    """The program: the step of pretraining on all chips of the slice, or what `e4t tune` or `e4t generate` runs on one of them."""
    per_device_batch: Annotated[int, Whole(1, 10_000)] | None = None
    """Pictures a step on each device (8 where not given), or concepts at once to tune or draw on each (1)."""
    scope: str = "compact"
    """To tune or generate: the scope of the concepts."""
    batch_size: BatchSize = 16
    """To tune: draws a step, of each concept."""
    prompts: Annotated[int, Whole(1, 1000)] = 4
    """To generate: prompts of each concept."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is spread over the devices."""
    fsdp: Count = 1
    """Over how many devices the base, the weights that learn and their moments are split; 1 keeps them whole on each."""
    accumulate: Count = 1
    """Parts that a batch is taken in, one after the other."""


def main(config: Config) -> None:
    import jax

    # The compiler is asked for by name; nothing is to be found on this machine but its CPU.
    jax.config.update("jax_platforms", "cpu")
    from e4t_jax.bases import load_base_shapes
    from e4t_jax.pretraining import aot

    devices = aot.topology_devices(config.topology)
    policy = config.policy(on_accelerator=True)
    model = load_base_shapes(config.base, config.image_encoder, clip_features=config.clip_features, **policy)
    count = config.per_device_batch or (8 if config.what == "pretrain" else 1)
    began = time.monotonic()
    if config.what == "pretrain":
        settings = PretrainSettings(parallel=config.parallel, fsdp=config.fsdp, accumulate=config.accumulate)
        cached = config.data == "cache"
        program = aot.compile_pretraining(devices, model, count, settings, cached=cached)
    else:
        domain, tuning = aot.domain_shapes(model), TuneSettings(scope=config.scope, batch_size=config.batch_size)
        lowered = (
            aot.lower_tune(domain, tuning, devices[:1], count)
            if config.what == "tune"
            else aot.lower_generate(domain, tuning, ["a photo of *s"] * config.prompts, devices[:1], count)
        )
        program, devices = aot.compiled(lowered), devices[:1]
    seconds = round(time.monotonic() - began, 1)
    # The compiler counts a loop over the parts of a batch once.
    figures = aot.figures(program, len(devices), count // config.accumulate)
    print(json.dumps({"what": config.what, **figures, "compile_s": seconds}))
