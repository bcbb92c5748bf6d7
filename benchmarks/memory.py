"""How many concepts one TPU chip tunes at once, compiled ahead of time for chips that are not there.

pip install "e4t-jax[tpu]"
python benchmarks/memory.py --chips v5e v5p v6e

Stable Diffusion 1.5 at 512×512, 16 draws, bfloat16, scope compact, blocks rematerialised: the steps of `tune_one`, side by side for
one concept, for the power of two that should fit by what one takes, and then for twice or half as many until one fits and its
double does not; what is held beside them (VAE and CLIP's image encoder, which prepare a picture before) is added. A program takes
many minutes to compile. Prints a table, and JSON as the last line.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=_CHIPS, default=list(_CHIPS))
    parser.add_argument("--base", default="random:sd15", help="none of its weights are drawn")
    parser.add_argument("--scope", default="compact", help="compact, head, full")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--most", type=int, default=64, help="concepts to try, at most")
    options = parser.parse_args()

    import jax

    jax.config.update("jax_platforms", "cpu")  # the TPU's compiler is asked for by name
    rows = []
    print(
        f"{'chip':5} {'N':>3} {'GiB in all':>10} {'temporary':>10} {'beside':>7} {'room':>6} {'fits':>5} {'compile s':>10}",
        flush=True,
    )
    for chip in options.chips:
        device, room = chip_of(chip)
        lower, beside = prepared(options.base, options.scope, options.batch_size, device)
        count, tried = 1, set()
        while 0 < count <= options.most and count not in tried:
            tried.add(count)
            began = time.perf_counter()
            held, temporary = needed(lower(count))
            whole, seconds = held + temporary + beside, time.perf_counter() - began
            fits = whole <= room
            print(
                f"{chip:5} {count:3} {whole:10.2f} {temporary:10.2f} {beside:7.2f} {room:6.2f} {fits!s:>5} {seconds:10.0f}",
                flush=True,
            )
            rows.append({"chip": chip, "count": count, "gib": whole, "temporary": temporary, "room": room, "fits": fits})
            rows[-1]["compile_s"] = seconds
            if count == 1 and fits:
                count = max(2, 2 ** int(math.log2((room - held - beside) / temporary)))
            else:
                count = count * 2 if fits else count // 2
    most = {chip: max((row["count"] for row in rows if row["chip"] == chip and row["fits"]), default=0) for chip in options.chips}
    print("As many fit at once (a power of two): " + ", ".join(f"{count} on {chip}" for chip, count in most.items()))
    print(json.dumps({"base": options.base, "scope": options.scope, "batch_size": options.batch_size, "fit": most, "rows": rows}))


def chip_of(name: str) -> tuple[Any, float]:
    """One chip of that kind, and the memory it has for a program."""
    from e4t_jax.pretraining.aot import topology_devices

    topology, room = _CHIPS[name]
    return topology_devices(topology)[0], room


def prepared(base: str, scope: str, batch_size: int, device: Any) -> tuple[Callable[[int], Any], float]:
    """What lowers the program for so many concepts, and the GiB of weights that it does not read."""
    import jax
    import numpy as np

    from e4t_jax.bases import load_base_shapes
    from e4t_jax.objective import make_method
    from e4t_jax.pretraining.step import given_of, init_trainable
    from e4t_jax.tuning.tune import TuneSettings, Views, tune_one

    model, params = load_base_shapes(base, dtype="bfloat16", remat="blocks")
    method = make_method(model, "a")  # which word it is changes no shape
    learned = jax.eval_shape(lambda: init_trainable(method, jax.random.key(0)))
    given = jax.eval_shape(lambda params: given_of(params, "bfloat16"), params)
    frozen = given.frozen._replace(factors=learned.factors, encoder=learned.encoder)
    recipe = TuneSettings(scope=scope, batch_size=batch_size).recipe(0.01)
    placed = jax.sharding.SingleDeviceSharding(device)

    def one(frozen: Any, own: Any) -> Any:
        views, prompts, number = own
        return tune_one(method, frozen, views, prompts, jax.random.fold_in(jax.random.key(0), number), recipe)

    def lower(count: int) -> Any:
        def rows(*shape: int, dtype: Any = np.float32) -> Any:
            return jax.ShapeDtypeStruct((count, *shape), dtype)

        latents, length = model.latent_shape, model.tokenizer.model_max_length
        views = Views(rows(6, *latents), rows(method.encoder.clip_layers, model.clip_width), rows(6, *latents[:2]))
        own = views, (rows(8, length, dtype=np.int32), rows(8, length, dtype=np.bool_)), rows(dtype=np.uint32)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), (frozen, own))
        return jax.jit(jax.vmap(one, in_axes=(None, 0))).lower(*shapes)

    beside = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(given.encoders))
    return lower, beside / 2**30


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
