"""One pure function, compiled two ways over all devices: `jit` over a mesh, or `pmap` over replicas.

    jit    the batch is split over the mesh's axis "data", all else is whole; the compiler adds the sums over devices
    pmap   every replica takes its share and means gradients over the axis "devices" by name: the same numbers

JAX keeps pmap in maintenance only; it is here for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e4t_jax.errors import UserError

PARALLEL = ("jit", "pmap")
AXIS = "devices"  # of pmap


def spread(
    function: Callable, parallel: str, split: Sequence[bool | None], *, donate: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`function` compiled over all devices, for arguments placed by `place`.

    `split` tells of each argument whether its leading axis is spread over the devices (True), or it is whole on each (False);
    None marks what is the same small value for all, such as a key.

    Errors: `UserError` for a `parallel` other than "jit" or "pmap".
    """
    if parallel not in PARALLEL:
        raise UserError(f"{parallel!r} is unknown; choose one of {', '.join(PARALLEL)}.", "parallel")
    if parallel == "pmap":
        axes = tuple(None if one is None else 0 for one in split)
        return jax.pmap(function, axis_name=AXIS, in_axes=axes, donate_argnums=donate)
    return jax.jit(function, donate_argnums=donate)


def axis_of(parallel: str) -> str | None:
    """The name of the axis over which gradients must be meaned by hand, if any."""
    return AXIS if parallel == "pmap" else None


def data_mesh() -> jax.sharding.Mesh:
    """All devices along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def place(tree: Any, parallel: str, *, split: bool) -> Any:
    """A tree on the devices as `spread` wants it: whole on each, or with its leading axis split over them.

    Errors: `UserError` when the batch does not divide by the devices.
    """
    count = jax.device_count()
    if split:
        for leaf in jax.tree.leaves(tree):
            check_divides(len(leaf))
    if parallel == "jit":
        return jax.device_put(tree, jax.NamedSharding(data_mesh(), jax.P("data") if split else jax.P()))
    if split:
        return jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), tree)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


def check_divides(batch_size: int) -> None:
    """Errors: `UserError` when a batch cannot be split evenly over the devices."""
    count = jax.device_count()
    if batch_size % count:
        raise UserError(f"{batch_size} does not divide by {count} devices; choose a multiple of {count}.", "batch_size")


def unplace(tree: Any, parallel: str) -> Any:
    """A whole tree back on the host."""
    return jax.device_get(tree if parallel == "jit" else jax.tree.map(lambda leaf: leaf[0], tree))
