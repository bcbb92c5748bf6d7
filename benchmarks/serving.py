"""How long those wait who send pictures to a queue (`e4t.Tuner`), at a share of what it can do.

python benchmarks/serving.py --pictures 200 --load 0.7

On the shipped domain, with its own settings, pictures of held-out creatures; every core is a device. First, alone: one picture
after the other, each sent when the one before is there. Then capacity: many sent at once. Then pictures at random times (Poisson:
pauses between them are exponential), `--load` of the capacity, by the seed. A latency is from when a picture is due until its
concept is there. Compilation is over before. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="sent at random times")
    parser.add_argument("--load", type=float, default=0.7, help="their rate, over the capacity")
    parser.add_argument("--alone", type=int, default=9, help="tunings of a single picture")
    parser.add_argument("--burst", type=int, default=24, help="pictures at once, for the capacity")
    parser.add_argument("--max-batch", type=int, help="pictures in one call; where not given, as many as a device computes at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_all_cores()

    import numpy as np

    from e4t_jax.creatures.judging.personalisation_trial import held_out
    from e4t_jax.files.domain_files import load_domain
    from e4t_jax.tuning.tuner import Tuner

    pictures = list(held_out(options.seed, options.pictures, split="validation").pictures)
    began = time.perf_counter()
    with Tuner(load_domain("creatures"), max_batch=options.max_batch) as tuner:
        compiling = time.perf_counter() - began
        alone = [latency for picture in pictures[: options.alone] for latency in sent(tuner, [picture], [0.0])]
        burst = sent(tuner, [pictures[row % len(pictures)] for row in range(options.burst)], [0.0] * options.burst)
        capacity = options.burst / max(burst)
        rate = options.load * capacity
        times = np.cumsum(np.random.default_rng(options.seed).exponential(1 / rate, options.pictures)).tolist()
        latencies = sent(tuner, pictures, times, "serving")
        sizes = tuner.sizes
    single = statistics.median(alone)
    p50, p95, p99 = (float(value) for value in np.percentile(latencies, (50, 95, 99)))
    print(f"sizes of a call      {', '.join(map(str, sizes))} (compiled in {compiling:.0f} s)")
    print(f"a single picture     {single:.2f} s (median of {len(alone)}, {min(alone):.2f} to {max(alone):.2f})")
    print(f"capacity             {capacity:.2f} concepts/s ({options.burst} at once)")
    print(f"{options.pictures} at {rate:.2f}/s        all answered, none twice")
    print(f"latency              p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s")
    print(f"p95 over a single    {p95 / single:.2f}")
    facts = {"sizes": sizes, "compile_s": compiling, "single_s": single, "capacity": capacity, "load": options.load, "rate": rate}
    facts |= {"pictures": options.pictures, "answered": len(latencies), "seed": options.seed}
    print(json.dumps({**facts, "p50_s": p50, "p95_s": p95, "p99_s": p99, "p95_over_single": p95 / single}))


def sent(tuner: Any, pictures: Sequence[Any], times: Sequence[float], description: str | None = None) -> list[float]:
    """Latencies of pictures that are due at some times from now, each answered with its own concept, once, or an error ends it."""
    answers: collections.Counter[str] = collections.Counter()
    done: dict[str, float] = {}
    promised = []
    began = time.perf_counter()

    def note(name: str) -> None:
        answers[name] += 1
        done[name] = time.perf_counter() - began

    for row, (picture, due) in enumerate(zip(pictures, times, strict=True)):
        time.sleep(max(due - (time.perf_counter() - began), 0))
        future = tuner.submit(picture, str(row))
        future.add_done_callback(lambda _, name=str(row): note(name))
        promised.append(future)
    waited = progress(promised, description, unit="picture") if description else promised
    concepts = [future.result() for future in waited]
    while len(done) < len(pictures):  # a future is ready a moment before its callbacks have run
        time.sleep(0.001)
    names = [str(row) for row in range(len(pictures))]
    if [concept.name for concept in concepts] != names or answers != collections.Counter(names):
        raise SystemExit(f"not each of {len(names)} pictures was answered once: {answers}")
    return [done[name] - due for name, due in zip(names, times, strict=True)]


if __name__ == "__main__":
    main()
