"""How fast pictures are drawn, by the number of concepts: one compiled call for several, beside a plain loop of single ones.

python benchmarks/sampling.py --counts 1 4 16

Concepts of the encoder alone, from pictures of held-out creatures or of `--images`; every core is a device. Times are medians of
calls in turn, compilation apart, with everything from concepts to uint8 pictures. A sampling step takes two passes of the U-Net for
each picture. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from subject import BASE_HELP, subject
from tuning import timed

from e4t_jax.cli.cores import use_all_cores
from e4t_jax.cli.progress import progress

_PROMPTS = ("a photo of *s in the snow", "a sketch of *s on a beach", "a cartoon of *s", "a watercolor of *s in a forest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 4, 16], help="how many concepts there are")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each case")
    parser.add_argument("--base", default="creatures", help=BASE_HELP)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="what the networks compute in")
    parser.add_argument("--images", type=Path, help="folder of pictures; the drawn world's where not given")
    options = parser.parse_args()
    use_all_cores()

    domain = subject(options.base, dtype=options.dtype)
    concepts = domain.tune(pictures(options.images, max(options.counts)), steps=0, caption=_PROMPTS[0])
    concepts = [concepts[row % len(concepts)] for row in range(max(options.counts))]

    def draw(count: int, first: int = 0) -> float:
        return timed(lambda: domain.generate(concepts[first : first + count], _PROMPTS, steps=options.steps))

    compiling = {count: draw(count) for count in dict.fromkeys([1, *options.counts])}
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in options.counts}
    for _ in progress(range(options.rounds), "sampling"):
        for count in options.counts:
            loop = statistics.median(draw(1, row) for row in range(min(count, 3)))
            times[count].append((draw(count) / count, loop))
    rows: list[dict[str, Any]] = []
    print(f"{'N':>3} {'pictures/s':>11} {'ms a step and picture':>22} {'over a loop':>12} {'first call s':>13}")
    for count in options.counts:
        seconds = statistics.median(mine for mine, _ in times[count]) / len(_PROMPTS)
        ratio = statistics.median(mine / loop for mine, loop in times[count])
        print(f"{count:3} {1 / seconds:11.1f} {seconds / options.steps * 1e3:22.2f} {ratio:12.2f} {compiling[count]:13.1f}")
        rows.append({"count": count, "pictures_per_s": 1 / seconds, "over_loop": ratio, "first_call_s": compiling[count]})
    facts = {"base": options.base, "dtype": options.dtype, "steps": options.steps, "prompts": len(_PROMPTS)}
    print(json.dumps({**facts, "rows": rows}))


def pictures(folder: Path | None, count: int) -> list[Any]:
    """Up to `count` of the files in a folder, or pictures of the drawn world."""
    if folder is not None:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))[:count]
    from e4t_jax.creatures.judging.personalisation_trial import held_out

    return list(held_out(3, count, split="validation").pictures)


if __name__ == "__main__":
    main()
