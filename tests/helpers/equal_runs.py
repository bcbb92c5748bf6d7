"""Ten steps of a tiny domain in this process, one of several or alone: its losses and weights, written by process 0.

python equal_runs.py OUT.npz '{"parallel": "jit", "fsdp": 2, …}' [FOLDER of checkpoints] [COORDINATOR COUNT ID]

The settings may have `until`, the step at which to stop with a checkpoint.
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from e4t_jax.data.batches import training_batches
from e4t_jax.errors import Stopped, UserError
from e4t_jax.pretraining.step import Observers, PretrainSettings, frozen_weights, pretrain_trainable
from e4t_jax.templates import templates
from e4t_jax.testing import tiny_domain
from e4t_jax.training import parallel
from e4t_jax.training.checkpoints import Checkpoints
from e4t_jax.training.processes import Processes, end, is_first, joined, stop_of_all

parallel._SMALL = 64  # so that "fsdp" splits what a tiny domain has


def pictures(size):
    """Sixteen random pictures, whose masks cover more and less."""
    import grain.python as grain

    generator = np.random.default_rng(0)
    rows = [
        {
            "image": generator.uniform(-1, 1, (size, size, 3)).astype(np.float32),
            "mask": (generator.uniform(size=(size, size)) < share).astype(np.float32),
        }
        for share in np.linspace(0.05, 1, 16)
    ]
    return grain.MapDataset.source(rows)


def main():
    out, options, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    until = options.pop("until", None)
    coordinator, count, which = (*sys.argv[4:], None, None, None)[:3]
    processes = Processes(
        coordinator=coordinator,
        num_processes=int(count) if count else None,
        process_id=int(which) if which else None,
    )
    with joined(processes):
        domain = tiny_domain()
        options = {"steps": 10, "checkpoint_every": 100, **options}
        settings = PretrainSettings(batch_size=16, learning_rate=1e-3, watch_every=1, **options)

        def batches(first):
            return training_batches(
                pictures(domain.base.image_size),
                domain.tokenize,
                templates("neutral"),
                batch_size=16,
                seed=0,
                first=first,
                last=settings.steps,
                share=(jax.process_index(), jax.process_count()),
            )

        losses, learned = {}, None
        steps = itertools.count(1)

        def note(step, figures, tflop):
            losses[step] = figures["loss"]
            if is_first():
                Path(f"{out}.begun").touch()
            return figures

        with Checkpoints(folder, {}, resume=True, say=lambda line: None) as checkpoints, contextlib.suppress(Stopped):
            learned = pretrain_trainable(
                domain.method,
                frozen_weights(domain.params),
                batches,
                settings,
                checkpoints=checkpoints,
                observers=Observers(
                    record=note,
                    stop=stop_of_all() if jax.process_count() > 1 and until is None else lambda: next(steps) == until,
                ),
            )
        if is_first() and learned is not None:
            weights = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(learned)}
            np.savez(out, losses=np.array(list(losses.values())), steps=np.array(list(losses)), **weights)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        end(f"Error: {error}")
