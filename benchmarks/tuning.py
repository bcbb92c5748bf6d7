"""How fast concepts are tuned, by how many there are: one compiled call for several, beside a plain loop of single ones.

python benchmarks/tuning.py --scopes compact full --counts 1 2 4 8 16

Five steps of sixteen draws on random latents, on the shipped domain or on a base by name; every core is a device. Times are medians
of calls in turn, compilation apart; memory is what the compiler says a device needs beside the weights. FLOP/s count the matrix
products and convolutions of a step as the compiler does; where the chip's peak is known, the JSON has the share of it. Prints a
table, what a thousand concepts cost at `--price` an hour, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from subject import BASE_HELP, subject

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress

_STEPS, _BATCH = 5, 16


class Case(NamedTuple):
    """So many concepts, all at once or one after the other."""

    run: Callable[[], Any]
    memory: int
    compiling: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scopes", nargs="+", default=["compact"], help="compact, head, full")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 16], help="how many concepts there are")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each case")
    parser.add_argument("--price", type=float, default=0.1, help="of an hour of this machine")
    parser.add_argument("--base", default="creatures", help=BASE_HELP)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what the networks compute in")
    options = parser.parse_args()
    use_all_cores()

    import jax

    from e4t_jax.training.flops import peak_of

    domain = subject(options.base, dtype=options.dtype)
    peak = peak_of(jax.devices()[0].device_kind)
    rows = []
    print(
        f"{'scope':8} {'N':>3} {'s/concept':>10} {'concepts/s':>11} {'over a loop':>12} {'GFLOP/s':>8} {'MB':>6} {'compile s':>10}"
    )
    for scope in options.scopes:
        work = flops(domain, scope) * _STEPS
        single = prepare(domain, scope, 1)
        cases = {count: single if count == 1 else prepare(domain, scope, count) for count in options.counts}
        times: dict[int, list[tuple[float, float]]] = {count: [] for count in cases}
        for _ in progress(range(options.rounds), scope):
            for count, case in cases.items():
                loop = timed(single.run)
                times[count].append((timed(case.run) / count, loop))
        for count, case in cases.items():
            seconds = statistics.median(mine for mine, _ in times[count])
            ratio = statistics.median(mine / loop for mine, loop in times[count])
            rate = work / seconds / 1e9
            print(
                f"{scope:8} {count:3} {seconds:10.3f} {1 / seconds:11.2f} {ratio:12.2f} {rate:8.0f} "
                f"{case.memory / 1e6:6.0f} {case.compiling:8.1f}"
            )
            row = {"scope": scope, "count": count, "seconds_per_concept": seconds, "over_loop": ratio, "gflops_per_s": rate}
            row["share_of_peak"] = rate / 1e3 / peak / len(jax.devices()) if peak else None
            rows.append({**row, "memory": case.memory, "compile_s": case.compiling, "per_thousand": seconds / 3.6 * options.price})
    print("A thousand concepts: " + ", ".join(f"{row['per_thousand']:.4f} ({row['scope']}, N = {row['count']})" for row in rows))
    print(json.dumps({"base": options.base, "dtype": options.dtype, "steps": _STEPS, "batch_size": _BATCH, "rows": rows}))


def timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def given(domain: Any, scope: str) -> tuple[Any, Any]:
    """What all concepts share, and one's own: random latents, as many captions as are read off a bare picture."""
    import jax
    import numpy as np

    from e4t_jax.tuning.personalise import PROMPTS
    from e4t_jax.tuning.tune import TuneSettings, Views

    generator, base = np.random.default_rng(0), domain.base
    latents = generator.standard_normal((6, *base.latent_shape), np.float32)
    clip = generator.standard_normal((domain.method.encoder.clip_layers, domain.method.encoder.clip_width), np.float32)
    views = Views(latents, clip, np.ones(latents.shape[:3], np.float32))
    recipe = TuneSettings(scope=scope, steps=_STEPS, batch_size=_BATCH).recipe_of(domain.regularisation)
    own = views, tuple(domain.tokenize(["a photo of *s in the snow"] * PROMPTS)), np.uint32(1)
    return (domain.method, domain.frozen, jax.random.key(0), recipe), own


def tune(shared: Any, own: Any) -> Any:
    """Five steps of one concept, without what prepares its picture."""
    import jax

    from e4t_jax.tuning.tune import tune_one

    (method, frozen, key, recipe), (views, prompts, number) = shared, own
    return tune_one(method, frozen, views, prompts, key=jax.random.fold_in(key, number), recipe=recipe)


def prepare(domain: Any, scope: str, count: int) -> Case:
    from e4t_jax.tuning.batching import fitted

    shared, own = given(domain, scope)
    began = time.perf_counter()
    batch = fitted(tune, shared, own, count, lower="batch_size")

    def run() -> None:
        for first in range(0, count, batch.size):
            batch.run([own] * min(batch.size, count - first))

    run()
    return Case(run, batch.needed, time.perf_counter() - began)


def flops(domain: Any, scope: str) -> float:
    """Of one step, before the compiler's own savings."""
    import jax

    from e4t_jax.objective import LossWeights, e4t_loss
    from e4t_jax.tuning.recipe import draw_batch
    from e4t_jax.tuning.tune import start

    (method, frozen, key, recipe), (views, prompts, _) = given(domain, scope)
    batch = draw_batch(views, prompts, recipe.batch_size, view_key=key, prompt_key=key)
    predicted = None if recipe.scope.fresh_word else jax.numpy.zeros(domain.base.text_width)

    def loss(trainable: Any, frozen: Any, batch: Any, predicted: Any) -> Any:
        return e4t_loss(method, trainable, frozen, batch, key, weights=LossWeights(0.0), predicted=predicted)[0]

    step = jax.jit(jax.grad(loss)).lower(start(method, frozen, recipe.scope, key), frozen, batch, predicted)
    return float(step.cost_analysis()["flops"])


if __name__ == "__main__":
    main()
