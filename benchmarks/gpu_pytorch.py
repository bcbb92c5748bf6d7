"""One case of `gpu.py`, the same work in PyTorch (`random_pytorch.py`); figures as lines of JSON as they are measured."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the geometry is read from ours, the device is PyTorch's

import torch
from random_pytorch import PROMPTS, Model

_TUNING_STEPS, _TUNING_BATCH = 5, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["pretraining", "tuning", "drawing"])
    parser.add_argument("--base", default="random:sd15")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    from e4t_jax.bases import load_base_shapes

    began = float(os.environ.get("E4T_BENCHMARK_BEGAN", time.time()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(load_base_shapes(options.base)[0], device, getattr(torch, options.dtype))
    if options.compile:
        model.denoiser.compile()
    size, count = model.base.image_size, options.batch_size
    pictures = torch.rand((count, 3, size, size), device=device, dtype=model.dtype) * 2 - 1

    def pretrain() -> None:
        with torch.no_grad():
            encoded = model.encode(pictures)
        model.step(*encoded)

    def tune() -> None:
        with torch.no_grad():
            latents, clip = (part[:1].repeat(_TUNING_BATCH, *[1] * (part.ndim - 1)) for part in model.encode(pictures[:1]))
        for _ in range(_TUNING_STEPS):
            model.step(latents, clip)

    call = {"pretraining": pretrain, "tuning": tune, "drawing": model.draw}[options.case]
    call()
    finish(device)
    print(json.dumps({"first step s": time.time() - began}), flush=True)
    seconds = median_seconds(call, device, 10 if options.case == "pretraining" else 3)
    name, many = {"pretraining": ("images/s", count), "drawing": ("pictures/s", PROMPTS)}.get(options.case, ("concepts/s", 1))
    print(json.dumps({name: many / seconds, "ms a call": 1e3 * seconds}), flush=True)
    if device == "cuda":
        print(json.dumps({"peak GB": torch.cuda.max_memory_allocated() / 1e9, "device": torch.cuda.get_device_name()}), flush=True)


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(call: Any, device: str, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        finish(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
