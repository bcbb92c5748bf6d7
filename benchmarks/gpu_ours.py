"""One case of `gpu.py`, ours: pretraining, tuning or drawing; figures as lines of JSON as they are measured."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from subject import subject

_PROMPTS = ("a photo of *s in the snow", "a sketch of *s on a beach", "a cartoon of *s", "a watercolor of *s in a forest")
_STEPS = 25


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["pretraining", "tuning", "drawing"])
    parser.add_argument("--base", default="random:sd15")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    began = float(os.environ.get("E4T_BENCHMARK_BEGAN", time.time()))
    import jax
    import numpy as np

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    domain = subject(options.base, dtype=options.dtype)
    size = domain.base.image_size
    pictures = np.random.default_rng(0).integers(0, 255, (16, size, size, 3), np.uint8)
    {"pretraining": pretraining, "tuning": tuning, "drawing": drawing}[options.case](domain, pictures, options.batch_size, began)
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    say(device=jax.local_devices()[0].device_kind, **({"peak GB": used / 1e9} if used else {}))


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    """Of calls after the first, whose results are waited for."""
    import jax

    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def pretraining(domain: Any, pictures: Any, batch_size: int, began: float) -> None:
    """The step of `e4t pretrain` on pictures, on one device."""
    import jax
    import numpy as np

    from e4t_jax.objective import LossWeights
    from e4t_jax.pretraining.step import compile_step, frozen_weights, init_trainable
    from e4t_jax.training import optimizers
    from e4t_jax.training.flops import peak_of, tflop_of
    from e4t_jax.training.loop import init_state
    from e4t_jax.training.parallel import layout

    method, where, tx = domain.method, layout("jit", 1, jax.local_devices()[:1]), optimizers.pretraining(1.6e-5, 100)
    ids, placeholder = domain.tokenize([_PROMPTS[0]] * batch_size)
    image = np.resize(pictures, (batch_size, *pictures.shape[1:])) / np.float32(127.5) - 1
    rows = {"image": image, "mask": np.ones(image.shape[:3], np.float32), "ids": ids, "placeholder": placeholder}
    placed, weights = where.place_rows(rows), where.place(frozen_weights(domain.params))
    state = where.place(jax.device_get(init_state(init_trainable(method, jax.random.key(0)), tx)))
    step: Any = compile_step(method, tx, LossWeights(0.01), where)
    key = jax.random.key(1)

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, weights, placed, key)
        return metrics["loss"]

    jax.block_until_ready(call())
    say(**{"first step s": time.time() - began})
    seconds = median_seconds(call, 10)
    say(**{"images/s": batch_size / seconds, "ms a step": 1e3 * seconds})
    tflop = tflop_of(step.lower(state, weights, placed, key).compile())
    peak = peak_of(jax.local_devices()[0].device_kind)
    if tflop and peak:
        say(**{"share of peak": tflop / seconds / peak})


def tuning(domain: Any, pictures: Any, batch_size: int, began: float) -> None:
    """`Domain.tune` of bare pictures, five steps, everything from uint8 pictures to concepts."""
    for count in (1, 4, 16):
        start = time.perf_counter()
        domain.tune(list(pictures[:count]))
        first = time.perf_counter() - start
        seconds = median_seconds(lambda count=count: [one.folded for one in domain.tune(list(pictures[:count]))], 3)
        say(**{f"s a concept, N = {count}": seconds / count, f"first call s, N = {count}": first})


def drawing(domain: Any, pictures: Any, batch_size: int, began: float) -> None:
    """`Domain.generate` of one concept in four prompts, everything from the concept to uint8 pictures."""
    concepts = domain.tune([pictures[0]], steps=0, caption=_PROMPTS[0])
    domain.generate(concepts, _PROMPTS, steps=_STEPS)
    seconds = median_seconds(lambda: domain.generate(concepts, _PROMPTS, steps=_STEPS), 5)
    say(**{"pictures/s": len(_PROMPTS) / seconds, "ms a step and picture": 1e3 * seconds / len(_PROMPTS) / _STEPS})


if __name__ == "__main__":
    main()
