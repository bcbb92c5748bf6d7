"""How many concepts one TPU chip tunes or draws at once, compiled ahead of time for chips that are not there.

pip install "e4t-jax[tpu]"
python benchmarks/memory.py --what tune --chips v5e v5p v6e

Stable Diffusion 1.5 at 512×512, bfloat16, blocks rematerialised: the very program that `e4t tune` runs on bare pictures (encoders,
captions, five steps of 16 draws in scope compact, fold), or `e4t generate` in four prompts; for one concept, for the power of two
that should fit by what one takes, and then for twice or half as many until one fits and its double does not. A program takes many
minutes to compile. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

# A slice's name, and GiB of memory that a program has on each chip.
_CHIPS = {"v5e": ("v5e:2x2", 15.75), "v5p": ("v5p:2x2x1", 95.0), "v6e": ("v6e:2x2", 31.25)}
_PROMPTS = ["a photo of *s"] * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["tune", "generate"], default="tune", help="the command whose program is compiled")
    parser.add_argument("--chips", nargs="+", choices=_CHIPS, default=list(_CHIPS))
    parser.add_argument("--base", default="random:sd15", help="none of its weights are drawn")
    parser.add_argument("--scope", default="compact", help="compact, head, full")
    parser.add_argument("--batch-size", type=int, default=16, help="draws a step")
    parser.add_argument("--most", type=int, default=64, help="concepts to try, at most")
    options = parser.parse_args()

    import jax

    jax.config.update("jax_platforms", "cpu")  # the TPU's compiler is asked for by name
    from e4t_jax.bases import load_base_shapes
    from e4t_jax.pretraining.aot import domain_shapes, lower_generate, lower_tune
    from e4t_jax.tuning.tune import TuneSettings

    domain = domain_shapes(load_base_shapes(options.base, dtype="bfloat16", remat="blocks"))
    settings = TuneSettings(scope=options.scope, batch_size=options.batch_size)

    def lower(device: Any, count: int) -> Any:
        if options.what == "tune":
            return lower_tune(domain, settings, [device], count)
        return lower_generate(domain, settings, _PROMPTS, [device], count)

    print(f"{'chip':5} {'N':>3} {'GiB in all':>10} {'temporary':>10} {'room':>6} {'fits':>5} {'compile s':>10}", flush=True)
    rows = [row for chip in options.chips for row in tried(chip, lower, options.most)]
    most = {chip: max((row["count"] for row in rows if row["chip"] == chip and row["fits"]), default=0) for chip in options.chips}
    print("As many fit at once (a power of two): " + ", ".join(f"{count} on {chip}" for chip, count in most.items()))
    print(json.dumps({**vars(options), "fit": most, "rows": rows}))


def tried(chip: str, lower: Callable[[Any, int], Any], most: int) -> list[dict[str, Any]]:
    """Counts of concepts on a chip, from one to the largest power of two that fits, as far as it takes to know it."""
    from e4t_jax.pretraining.aot import topology_devices

    topology, room = _CHIPS[chip]
    device, rows, count = topology_devices(topology)[0], [], 1
    while 0 < count <= most and count not in [row["count"] for row in rows]:
        began = time.perf_counter()
        held, temporary = needed(lower(device, count))
        seconds, fits = time.perf_counter() - began, held + temporary <= room
        print(f"{chip:5} {count:3} {held + temporary:10.2f} {temporary:10.2f} {room:6.2f} {fits!s:>5} {seconds:10.0f}", flush=True)
        rows.append({"chip": chip, "count": count, "gib": held + temporary, "temporary": temporary, "room": room, "fits": fits})
        rows[-1]["compile_s"] = seconds
        likely = max(2, 2 ** int(math.log2((room - held) / temporary))) if fits else 0
        count = likely if count == 1 else count * 2 if fits else count // 2
    return rows


def needed(lowered: Any) -> tuple[float, float]:
    """GiB that a program holds and those that it takes meanwhile; endless where the compiler has no room for it."""
    import jax

    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(str(error).splitlines()[0][:200], flush=True)
        return float("inf"), 0.0
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held / 2**30, (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / 2**30


if __name__ == "__main__":
    main()
