"""Compiles the step of pretraining for TPUs that are not there: the memory it needs and the bytes it moves, as one line of JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, Literal

from e4t_jax.checks import Count, Whole
from e4t_jax.cli.shared import NetworkCommand
from e4t_jax.pretraining.step import PretrainSettings


@dataclass(frozen=True)
class Config(NetworkCommand):
    """Compile the step of pretraining ahead of time; the last line is JSON: devices, hbm_gb, tflop_per_image, …"""

    topology: str = "v5e:4x4"
    """The slice to compile for, KIND:ROWSxCOLUMNS: v5e:4x4, v5p:2x2x2, v6e:16x16."""
    base: str = "random:sd15"
    """Base model, as train.pretrain takes it; random:sd15 and random:sd21 are not even drawn."""
    image_encoder: str | None = None
    """CLIP's, as train.pretrain takes it."""
    clip_features: Literal["layers", "tokens"] = "layers"
    """What of CLIP's the encoder sees."""
    data: Literal["pictures", "cache"] = "pictures"
    """What the step reads: pictures, with VAE and CLIP in the step, or rows of train.cache, with neither."""
    per_device_batch: Annotated[int, Whole(1, 10_000)] = 8
    """Pictures a step on each device."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How the step is spread over the devices."""
    fsdp: Count = 1
    """Over how many devices the base, the weights that learn and their moments are split; 1 keeps them whole on each."""
    accumulate: Count = 1
    """Parts that a batch is taken in, one after the other."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the networks compute in; weights that learn, norms and results stay float32."""
    remat: Literal["none", "blocks"] = "blocks"
    """What is computed again for the gradient rather than kept."""
    attention: Literal["auto", "xla"] = "auto"
    """The platform's own attention kernel where it has one, or the plain form everywhere."""


def main(config: Config) -> None:
    import jax

    # The compiler is asked for by name; nothing is to be found on this machine but its CPU.
    jax.config.update("jax_platforms", "cpu")
    from e4t_jax.pretraining.aot import compile_for, figures, topology_devices

    devices = topology_devices(config.topology)
    settings = PretrainSettings(parallel=config.parallel, fsdp=config.fsdp, accumulate=config.accumulate)
    began = time.monotonic()
    compiled = compile_for(
        devices,
        config.base,
        config.per_device_batch,
        settings,
        image_encoder=config.image_encoder,
        clip_features=config.clip_features,
        cached=config.data == "cache",
        policy={"dtype": config.dtype, "remat": config.remat, "attention": config.attention},
    )
    seconds = time.monotonic() - began
    # The compiler counts a loop over the parts of a batch once.
    print(
        json.dumps(
            {**figures(compiled, len(devices), config.per_device_batch // config.accumulate), "compile_s": round(seconds, 1)}
        )
    )
