"""Ours beside the same tuning written plainly in PyTorch, on the shipped base: first the same numbers, then the time they take.

python benchmarks/versus_pytorch.py --rounds 3

1. Five steps of AdamW from the same weights on the same draws, scopes head and full: losses and parameters are compared.
2. Five steps as each is used (PyTorch: whole U-Net, encoder, literal offset networks, AdamW; ours: `personalise`'s steps by scope,
   for one concept and for sixteen in one call), in turn, on ONE core, compilation apart.

Prints tables, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

_STEPS, _BATCH, _RATE, _DECAY, _MANY = 5, 16, 1e-3, 0.01, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each case; 0 compares the numbers alone")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX and PyTorch count the cores
    import numpy as np
    import torch

    from e4t_jax import bases
    from e4t_jax.files.domain_files import load_domain

    torch.set_num_threads(1)
    domain = load_domain("creatures")
    with tempfile.TemporaryDirectory() as folder:
        bases.save_folder(Path(folder), domain.base, domain.params, np.float32)
        figures: dict[str, Any] = {"trajectories": trajectories(domain, Path(folder))}
        if options.rounds:
            figures |= times(domain, Path(folder), options.rounds)
    print(json.dumps(figures))


def draws(domain: Any) -> list[tuple[Any, Any, Any]]:
    """Batches, timesteps and noise of five steps."""
    import jax
    import numpy as np

    from e4t_jax.objective import ConceptBatch

    generator, base = np.random.default_rng(0), domain.base
    ids, placeholder = domain.tokenize(["a photo of *s in the snow"] * _BATCH)
    clip = generator.standard_normal((1, domain.method.encoder.clip_layers, domain.method.encoder.clip_width), np.float32)
    drawn = []
    for _ in range(_STEPS):
        latents, noise = generator.standard_normal((2, _BATCH, *base.latent_shape), np.float32)
        mask = np.ones(latents.shape[:3], np.float32)
        batch = ConceptBatch(latents, np.repeat(clip, _BATCH, 0), ids, placeholder, mask)
        drawn.append((batch, generator.integers(0, 1000, _BATCH, np.int32), noise))
    return jax.tree.map(np.asarray, drawn)


def trajectories(domain: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Largest relative differences of losses and of parameters after five steps, by scope."""
    import jax
    import numpy as np
    import optax
    import torch
    from flax.traverse_util import flatten_dict
    from plain_pytorch import Plain, offset_by_factors, tensor

    from e4t_jax.bases.stable_diffusion.names import to_torch, torch_name
    from e4t_jax.objective import Draws, LossWeights, e4t_loss_at
    from e4t_jax.training.loop import init_state, update
    from e4t_jax.tuning.scopes import SCOPES
    from e4t_jax.tuning.tune import start

    method, frozen, steps = domain.method, domain.frozen, draws(domain)
    plain = Plain(folder, method.empty_ids, int(method.domain_id), domain.scale)
    tx = optax.adamw(_RATE, weight_decay=_DECAY)
    figures = {}
    for scope in ("head", "full"):
        begun = start(method, frozen, SCOPES[scope], jax.random.key(1))

        def loss(trainable, frozen, given, key):
            batch, t, noise = given
            return e4t_loss_at(method, trainable, frozen, batch, Draws(t, noise), weights=LossWeights(domain.regularisation))

        step, state, ours = jax.jit(partial(update, loss, tx)), init_state(begun, tx), []
        for given in steps:
            state, metrics = step(state, frozen, given, jax.random.key(0))
            ours.append(float(metrics["loss"]))
        leaves = jax.tree.map(lambda leaf: tensor(leaf).requires_grad_(), {"factors": begun.factors, "encoder": begun.encoder})
        unet = {name: weight.detach().clone().requires_grad_(scope == "full") for name, weight in plain.unet_weights().items()}
        learning = [*jax.tree.leaves(leaves), *(unet.values() if scope == "full" else ())]
        optimiser, theirs = torch.optim.AdamW(learning, _RATE, weight_decay=_DECAY), []
        domains_own = jax.tree.map(tensor, domain.factors)
        for batch, t, noise in steps:
            weights = offset_by_factors(unet, leaves["factors"], domains_own)
            value = plain.loss(weights, leaves["encoder"], batch, t, noise, domain.regularisation)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            theirs.append(value.item())
        made = state.params
        pairs = [*zip(jax.tree.leaves({"factors": made.factors, "encoder": made.encoder}), jax.tree.leaves(leaves), strict=True)]
        if scope == "full":
            flat = flatten_dict(made.unet, sep="/")
            pairs += [(to_torch(path, np.asarray(leaf)), unet[torch_name("unet", path)]) for path, leaf in flat.items()]
        apart = [np.linalg.norm(a - b.detach().numpy()) / max(np.linalg.norm(a), 1e-12) for a, b in pairs]
        figures[scope] = {
            "losses": max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)),
            "parameters": float(max(apart)),
        }
        print(f"{scope:8} losses apart {figures[scope]['losses']:.1e}, parameters {figures[scope]['parameters']:.1e} (relative)")
    return figures


def times(domain: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds a concept of every case, medians of calls in turn, and their ratio to PyTorch's."""
    from tuning import prepare, timed

    cases = {"pytorch, full": (1, torch_case(domain, folder))}
    for scope, count in (("full", 1), ("compact", 1), ("compact", _MANY)):
        cases[f"ours, {scope}, {count}"] = (count, prepare(domain, scope, count).run)
    for _, call in cases.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (count, call) in cases.items():
            seconds[name].append(timed(call) / count)
    rows = {}
    print(f"{'case':20} {'s/concept':>10} {'from':>7} {'to':>7} {'over PyTorch':>13}")
    for name, values in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(values, seconds["pytorch, full"], strict=True))
        rows[name] = {"seconds": statistics.median(values), "least": min(values), "most": max(values), "over_pytorch": ratio}
        print(f"{name:20} {rows[name]['seconds']:10.2f} {min(values):7.2f} {max(values):7.2f} {ratio:13.2f}")
    return {"cores": 1, "rounds": rounds, "cases": rows}


def torch_case(domain: Any, folder: Path) -> Any:
    import jax
    import torch
    from plain_pytorch import OffsetNetwork, Plain, offset_by_networks, tensor

    from e4t_jax import bases

    method, steps = domain.method, draws(domain)
    plain = Plain(folder, method.empty_ids, int(method.domain_id), domain.scale)

    def tune() -> None:
        unet = {name: weight.detach().clone().requires_grad_() for name, weight in plain.unet_weights().items()}
        networks = {
            bases.torch_name("unet", f"{path}/kernel"): OffsetNetwork(*kernel.shape)
            for path, kernel in domain.base.offset_kernels(domain.params["unet"]).items()
        }
        encoder = jax.tree.map(lambda leaf: tensor(leaf).requires_grad_(), domain.encoder)
        offsets = [parameter for network in networks.values() for parameter in network.parameters()]
        optimiser = torch.optim.AdamW([*unet.values(), *offsets, *jax.tree.leaves(encoder)], 1e-5)
        for batch, t, noise in steps:
            value = plain.loss(offset_by_networks(unet, networks), encoder, batch, t, noise, domain.regularisation)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()

    return tune


if __name__ == "__main__":
    main()
