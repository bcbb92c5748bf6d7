"""The update step and the loop around it: the same for base model, judges and domains; tuning scans the same step.

params ← params + tx(∇ loss(params, frozen, batch, key))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import PRNGKeyArray

from e4t_jax.arrays import Array
from e4t_jax.errors import Stopped, UserError
from e4t_jax.training.checkpoints import Checkpoints

# (params, frozen, batch, key) -> (value to minimise, figures to watch)
Loss = Callable[[Any, Any, Any, PRNGKeyArray], tuple[Array, dict[str, Array]]]


@struct.dataclass
class TrainState:
    """What an update carries from step to step."""

    params: Any
    moments: Any  # of the optimiser
    step: Any  # int32 [], on a device or the host; stores map such trees to what they know of each leaf
    average: Any = None  # moving average of the weights, where one is kept


Step = Callable[[TrainState, Any, Any, PRNGKeyArray], tuple[TrainState, dict[str, Array]]]


def init_state(params: Any, tx: optax.GradientTransformation, *, average: bool = False) -> TrainState:
    """The state before the first step; an average starts at the weights."""
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params) if average else None)


def update(
    loss: Loss,
    tx: optax.GradientTransformation,
    state: TrainState,
    frozen: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    axis: str | None = None,
    accumulate: int = 1,
    decay: float = 0.999,
) -> tuple[TrainState, dict[str, Array]]:
    """One update, of the mean of the gradients over `accumulate` shares of the batch and over the `pmap` axis where there is one.

    `decay` is that of a state's average.
    """
    gradients, metrics = _mean_gradients(loss, accumulate, state.params, frozen, batch, key=key)
    if axis is not None:
        gradients, metrics = jax.lax.pmean((gradients, metrics), axis)
    changes, moments = tx.update(gradients, state.moments, state.params)
    params = optax.apply_updates(state.params, changes)
    average = None
    if state.average is not None:
        # Early averages forget quickly, so that a short run is not held back by its random start.
        keep = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - keep) * (p - a), state.average, params)
    return TrainState(params, moments, state.step + 1, average), metrics


def _mean_gradients(loss: Loss, shares: int, params: Any, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[Any, Any]:
    """Gradients and figures, meaned over `shares` of the batch that are taken one after the other."""

    def of(share: Any) -> tuple[Any, Any]:
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params, frozen, share, key)
        return gradients, metrics

    if shares == 1:
        return of(batch)
    # Every n-th row: what is split over devices stays where it lies.
    split = jax.tree.map(lambda leaf: leaf.reshape(-1, shares, *leaf.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, jax.tree.map(lambda leaf: leaf[0], split)))
    total, _ = jax.lax.scan(lambda total, share: (jax.tree.map(jnp.add, total, of(share)), None), zeros, split)
    return jax.tree.map(lambda leaf: leaf / shares, total)


def step_of(loss: Loss, tx: optax.GradientTransformation) -> Step:
    """`update` with randomness of its own at every step, from one key for the whole run."""

    def step(state: TrainState, frozen: Any, batch: Any, key: PRNGKeyArray) -> tuple[TrainState, dict[str, Array]]:
        return update(loss, tx, state, frozen, batch, key=jax.random.fold_in(key, state.step))

    return step


class Run(NamedTuple):
    """How far a training goes, what it saves, and who watches."""

    name: str
    steps: int
    checkpoints: Checkpoints | None = None
    every: int = 500  # steps from one checkpoint to the next
    track: Callable[..., Any] = iter  # wraps the loop over the steps: a progress bar
    watch: int = 25  # steps from one look at the figures to the next
    record: Callable[[int, dict[str, float]], dict[str, float]] = lambda step, figures: figures  # told of them; gives the bar's
    every_sample: int = 0  # steps from one time that samples are drawn to the next; 0: never
    sample: Callable[[int, Any], None] = lambda step, params: None  # draws them
    stop: Callable[[], bool] = lambda: False  # asked after every step: whether to save and end here


def train(
    run: Run,
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Callable[[int], Iterable[Any]],
    *,
    key: PRNGKeyArray,
    stored: Callable[[TrainState], TrainState] = lambda state: state,
) -> TrainState:
    """Takes `state` to `run.steps`; `batches(first)` yields the batches from that step on, `stored` turns a state
    into what checkpoints hold.

    The state is saved every `run.every` steps, at the end and when asked to stop, but never one that is not finite.

    Errors: `UserError` when a figure or a number of the state is not finite; `Stopped` when `run.stop` said so before the end.
    """
    first = int(np.ravel(read(state.step))[0])
    bar = run.track(range(first, run.steps))
    rows: Iterator[Any] = iter(batches(first)) if first < run.steps else iter(())
    for index in bar:
        state, metrics = step(state, frozen, next(rows), key)
        last = index + 1 == run.steps
        stops = not last and run.stop()
        saves = last or stops or (index + 1) % run.every == 0
        if saves or (index + 1) % run.watch == 0:
            values = {name: float(np.mean(read(value))) for name, value in metrics.items()}
            _check_finite(run, index + 1, values)
            shown = run.record(index + 1, values)
            if hasattr(bar, "set_postfix"):
                bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        if saves:
            if not _all_finite(state):
                _give_up(run, index + 1, "A weight, or a moment of the optimiser,")
            if run.checkpoints is not None:
                run.checkpoints.save(index + 1, stored(state))
        elif run.checkpoints is not None:
            run.checkpoints.seal()
        if stops:
            if run.checkpoints is not None:
                run.checkpoints.wait()
            raise Stopped(index + 1)
        if run.every_sample and (index + 1) % run.every_sample == 0:
            run.sample(index + 1, state.params)
    if run.checkpoints is not None:
        run.checkpoints.wait()
    return state


def _check_finite(run: Run, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            _give_up(run, step, f"The {name}")


def read(leaf: Any) -> np.ndarray:
    """A number on the host, also one that lies whole on the devices of many processes."""
    return np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)


@jax.jit
def _finite(tree: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _all_finite(tree: Any) -> bool:
    return bool(read(_finite(tree)))


def _give_up(run: Run, step: int, what: str) -> None:
    mend = "lower the learning rate"
    if run.checkpoints:
        # Not by resuming: another rate is another run.
        mend += " and give another work folder"
        saved = run.checkpoints.latest()
        mend += f"; {run.checkpoints.folder} keeps step {saved}, the last good one" if saved else ""
    raise UserError(f"{run.name}: {what} is not finite at step {step}; {mend}.")
