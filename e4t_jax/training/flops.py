"""What a device computes in a step, as the compiler counts it, and the most that its maker says it can.

share of peak = operations a step / (seconds a step · peak)
"""

from __future__ import annotations

import re
from typing import Any

import jax

# Dense matrix products in bfloat16 (float16 where there is none), TFLOP/s of one JAX device, by the makers' data sheets; of two
# kinds that fit a name, the longer. A device of TPU v2 and v3 is half a chip.
PEAKS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5": 459.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v6": 918.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "Tesla T4": 65.0,
    "Tesla V100": 125.0,
}


def peak_of(device_kind: str) -> float | None:
    """TFLOP/s of a device of this kind (`jax.Device.device_kind`); None for a CPU and whatever the table lacks."""
    # "NVIDIA L4" begins the name of an L40S too: a kind ends where a word does.
    fitting = [kind for kind in PEAKS if re.match(rf"{kind}\b", device_kind)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def tflop_of(compiled: jax.stages.Compiled, parts: int = 1) -> float | None:
    """10¹² operations of one device in a call of a compiled program; None where its compiler does not say.

    A loop over the `parts` of a batch is counted once by the compiler, and Pallas' and cuDNN's kernels not at all.
    """
    said: Any = compiled.cost_analysis()
    return said["flops"] * parts / 1e12 if said and said.get("flops", 0) > 0 else None
