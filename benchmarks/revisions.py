"""Two checkouts of this package side by side: is the newer one slower, to run or to compile?

python benchmarks/revisions.py --old ../older-checkout --new . --rounds 7

Each checkout runs in a process of its own; both are timed in turn, one call each, so that what else the machine does meets both
alike. On the shipped domain: the gradient step of pretraining (16 pictures), five tuning steps (compact, full), ten sampling steps
of four prompts. Prints medians and their ratio, new over old, compile time apart, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def child() -> None:
    """Serves one checkout: compiles each case when it is first named on standard input, then runs it; answers with seconds."""
    import jax
    import jax.numpy as jnp
    import optax

    from e4t_jax.objective import ConceptBatch, Frozen, Trainable, e4t_loss
    from e4t_jax.sample import sample_latents
    from e4t_jax.samplers import sampler

    try:
        from e4t_jax.files.domain_files import load_domain
        from e4t_jax.objective import LossWeights
        from e4t_jax.sample import Drawing, DrawnConcept
        from e4t_jax.tuning.tune import TuneSettings, Views, tune_one

        older = False
    except ImportError:  # before tuning had a room of its own
        from e4t_jax.domain_files import load_domain
        from e4t_jax.training.tune import TuneSettings, Views, tune_one

        older = True
    domain = load_domain("creatures")
    base, method, frozen = domain.base, domain.method, domain.frozen
    keys = jax.random.split(jax.random.key(0), 4)
    clip = jax.random.normal(keys[1], (16, method.encoder.clip_layers, method.encoder.clip_width))
    latents = jax.random.normal(keys[0], (16, *base.latent_shape))
    ids, placeholder = (jnp.asarray(part) for part in domain.tokenize(["a photo of *s in the snow"] * 16))
    batch = ConceptBatch(latents, clip, ids, placeholder, jnp.ones(latents.shape[:3]))
    tx = optax.adamw(1e-3)

    @jax.jit
    def pretraining(trainable, moments, batch, key):
        weights = {"regularisation": 1e-4} if older else {"weights": LossWeights(1e-4)}
        loss = lambda trainable: e4t_loss(method, trainable, plain, batch, key, **weights)[0]  # noqa: E731
        updates, moments = tx.update(jax.grad(loss)(trainable), moments, trainable)
        return optax.apply_updates(trainable, updates), moments

    plain = Frozen(frozen.unet, frozen.text_encoder)
    trainable = Trainable(frozen.factors, frozen.encoder)
    moments = tx.init(trainable)
    views = Views(latents[:6], clip[0], jnp.ones((6, *latents.shape[1:3])))
    prompts = ids[:4], placeholder[:4]
    tune = jax.jit(tune_one)

    def tuning(scope):
        recipe = TuneSettings(scope=scope, steps=5, batch_size=16).recipe_of(1e-4)
        if older:
            return lambda: tune(method, frozen, views, prompts, keys[2], recipe)
        return lambda: tune(method, frozen, views, prompts, key=keys[2], recipe=recipe)

    draw = jax.jit(sample_latents)

    def sampling():
        steps, folded = sampler(method.schedule, "ddim", 10), jnp.zeros(method.encoder.clip_width)
        if older:
            return draw(method, steps, Trainable(), frozen, folded, ids[:4], placeholder[:4], latents[:4], 4.0, keys[3])
        run = Drawing(method, steps, frozen, {}, ids[:4], placeholder[:4], latents[:4], 4.0, keys[3])
        return draw(run, DrawnConcept(Trainable(), folded))

    cases = {
        "pretraining": lambda: pretraining(trainable, moments, batch, keys[2]),
        "compact": tuning("compact"),
        "full": tuning("full"),
        "sampling": sampling,
    }
    for line in sys.stdin:
        began = time.perf_counter()
        jax.block_until_ready(cases[line.strip()]())
        print(json.dumps(time.perf_counter() - began), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="checkout to compare with")
    parser.add_argument("--new", type=Path, default=Path("."), help="checkout to measure")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child()
    if options.old is None:
        parser.error("--old is needed")
    servers = {name: serve(getattr(options, name)) for name in ("old", "new")}
    results = {}
    print(f"{'case':12} {'old ms':>9} {'new ms':>9} {'ratio':>7} {'compile old s':>14} {'new s':>7} {'ratio':>7}")
    for case in ("pretraining", "compact", "full", "sampling"):
        first = {name: ask(server, case) for name, server in servers.items()}
        rounds = [{name: ask(server, case) for name, server in servers.items()} for _ in range(options.rounds)]
        median = {name: statistics.median(one[name] for one in rounds) for name in servers}
        compiling = {name: first[name] - median[name] for name in servers}
        row = {
            "old_ms": 1e3 * median["old"],
            "new_ms": 1e3 * median["new"],
            "ratio": statistics.median(one["new"] / one["old"] for one in rounds),
            "compile_old_s": compiling["old"],
            "compile_new_s": compiling["new"],
            "compile_ratio": compiling["new"] / compiling["old"],
        }
        results[case] = row
        print(
            f"{case:12} {row['old_ms']:9.0f} {row['new_ms']:9.0f} {row['ratio']:7.2f} {row['compile_old_s']:14.1f} "
            f"{row['compile_new_s']:7.1f} {row['compile_ratio']:7.2f}",
            flush=True,
        )
    print(json.dumps(results))


def serve(checkout: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONPATH"] = str(checkout.resolve())
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    return subprocess.Popen(command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(server: subprocess.Popen, case: str) -> float:
    assert server.stdin and server.stdout
    print(case, file=server.stdin, flush=True)
    return float(json.loads(server.stdout.readline()))


if __name__ == "__main__":
    main()
