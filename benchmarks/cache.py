"""What encoding pictures once saves: pretraining of the embedded world on pictures and on a cache of them, in turn.

python benchmarks/cache.py

Draws pictures into a folder, makes a cache of it, and pretrains on the one and on the other, `--rounds` times each: images a second
is the median of the looks after the first, over all rounds. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import jax

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import say
from e4t_jax.tuning.compiled_cache import keep_programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    keep_programs()
    use_all_cores()
    from e4t_jax.creatures.judging.personalisation_trial import held_out, write_pictures
    from e4t_jax.pretraining.encode_once import cache

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_pictures(held_out(0, options.pictures, split="train"), folder / "pictures", "mask")
        cache("creatures", f"folder:{folder / 'pictures'}", folder / "cache", say=say)
        looks: dict[str, list[dict[str, float]]] = {"folder": [], "cache": []}
        for turn in range(options.rounds):
            for kind, name in (("folder", "pictures"), ("cache", "cache")):
                looks[kind] += run(f"{kind}:{folder / name}", folder / f"{kind}_{turn}", options.batch_size, options.steps)
    speeds = {kind: statistics.median(look["images_per_second"] for look in ones) for kind, ones in looks.items()}
    work = {kind: gflop_of(ones[0], options.batch_size) for kind, ones in looks.items()}
    for kind, speed in speeds.items():
        print(f"{kind:8}{speed:8.1f} images/s{work[kind]:8.2f} GFLOP an image")
    told = {f"{kind}_images_per_second": round(speed, 1) for kind, speed in speeds.items()}
    told |= {f"{kind}_gflop_per_image": round(one, 3) for kind, one in work.items()}
    ratios = {"speed": speeds["cache"] / speeds["folder"], "gflop": work["cache"] / work["folder"]}
    print(json.dumps({**told, **{f"{name}_ratio": round(ratio, 3) for name, ratio in ratios.items()}}))


def run(data: str, work: Path, batch_size: int, steps: int) -> list[dict[str, float]]:
    """What was seen at every look at a run but the first two: the second one still has the first steps' warming up."""
    from e4t_jax import pretrain
    from e4t_jax.creatures.presets import creatures

    changes = {"steps": steps, "batch_size": batch_size, "watch_every": 5, "sample_every": 0, "checkpoint_every": steps}
    settings = dataclasses.replace(creatures().training, **changes)
    pretrain("creatures", data, settings=settings, work=work, say=say)
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()][2:]


def gflop_of(look: dict[str, float], batch_size: int) -> float:
    """10⁹ operations an image, as the compiler counts them."""
    return 1e3 * look["tflops_per_device"] * look["seconds_per_step"] * jax.device_count() / batch_size


if __name__ == "__main__":
    main()
