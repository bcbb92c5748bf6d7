"""Where arrays lie: one pure step, compiled two ways over all devices of all processes.

    jit    over a mesh "data" × "fsdp": the batch is split over both; weights and moments are whole, or split over "fsdp" and
           gathered where they are used; the compiler adds the sums over devices
    pmap   every replica takes its share of the batch and means gradients over the axis "devices" by name: the same numbers

JAX keeps pmap in maintenance only; it is here for comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from e4t_jax.errors import UserError

PARALLEL = ("jit", "pmap")
_AXIS = "devices"  # of pmap
_SMALL = 2**14  # numbers; what has fewer is whole everywhere: gathering it would cost more than it saves


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of a run lie on its devices; made by `layout`."""

    parallel: Literal["jit", "pmap"]
    mesh: jax.sharding.Mesh

    @property
    def axis(self) -> str | None:
        """The name of the axis over which sums must be taken by hand, if any."""
        return _AXIS if self.parallel == "pmap" else None

    @property
    def replicas(self) -> int:
        """How many shares `axis` has."""
        return self.mesh.size if self.parallel == "pmap" else 1

    @property
    def local_size(self) -> int:
        """How many of the devices are this process's."""
        return len(self.mesh.local_devices)

    def check_divides(self, batch_size: int, accumulate: int = 1, argument: str = "batch_size") -> None:
        """Errors: `UserError` when a batch cannot be split evenly over the devices, and their shares into `accumulate` parts."""
        parts = self.mesh.size * accumulate
        if batch_size % parts:
            what = f"{self.mesh.size} devices" + (f" × {accumulate} parts" if accumulate > 1 else "")
            raise UserError(f"{batch_size} does not divide by {what}; choose a multiple of {parts}.", argument)

    def sharding(self, leaf: Any) -> jax.NamedSharding:
        """Where a leaf of weights or moments lies: its longest side that divides split over "fsdp", or whole."""
        shape, parts = np.shape(leaf), self.mesh.shape["fsdp"]
        sides = [side for side in range(len(shape)) if shape[side] % parts == 0]
        if parts == 1 or not sides or np.prod(shape) < _SMALL:
            return jax.NamedSharding(self.mesh, jax.P())
        longest = max(sides, key=lambda side: shape[side])
        return jax.NamedSharding(self.mesh, jax.P(*[None] * longest, "fsdp"))

    def batch_sharding(self) -> jax.NamedSharding:
        """Where the rows of a batch lie."""
        return jax.NamedSharding(self.mesh, jax.P(("data", "fsdp")))

    def place(self, tree: Any) -> Any:
        """Weights or moments, the same on every process, on the devices as the step wants them."""
        if self.parallel == "pmap":
            return self._to_replicas(jax.tree.map(lambda leaf: np.broadcast_to(leaf, (self.local_size, *np.shape(leaf))), tree))
        if jax.process_count() == 1:
            return jax.tree.map(lambda leaf: jax.device_put(leaf, self.sharding(leaf)), tree)

        def split(leaf: Any) -> jax.Array:
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, self.sharding(whole), lambda index: whole[index])

        return jax.tree.map(split, tree)

    def place_rows(self, rows: Any) -> Any:
        """This process's share of a batch on its devices; the shares of all processes, in their order, are the batch.

        Errors: `UserError` when it does not divide by the devices.
        """
        for leaf in jax.tree.leaves(rows):
            self.check_divides(len(leaf) * jax.process_count())
        if self.parallel == "pmap":
            return self._to_replicas(jax.tree.map(lambda leaf: leaf.reshape(self.local_size, -1, *leaf.shape[1:]), rows))
        return jax.tree.map(partial(jax.make_array_from_process_local_data, self.batch_sharding()), rows)

    def _to_replicas(self, tree: Any) -> Any:
        """What has a leading axis of this process's replicas, each on its own."""
        replicas = jax.NamedSharding(jax.sharding.Mesh(self.mesh.devices.ravel(), (_AXIS,)), jax.P(_AXIS))
        return jax.tree.map(partial(jax.make_array_from_process_local_data, replicas), tree)

    def shapes(self, tree: Any) -> Any:
        """The shapes of weights or moments, with where they would lie: to compile for, or to restore as."""

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            if self.parallel == "pmap":
                return jax.ShapeDtypeStruct((self.mesh.size, *np.shape(leaf)), leaf.dtype)
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=self.sharding(leaf))

        return jax.tree.map(shape, tree)

    def row_shapes(self, rows: Any) -> Any:
        """The shapes of a batch over all devices, with where it would lie: to compile for."""

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            if self.parallel == "pmap":
                return jax.ShapeDtypeStruct((self.mesh.size, len(leaf) // self.mesh.size, *leaf.shape[1:]), leaf.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.batch_sharding())

        return jax.tree.map(shape, rows)

    def unplace(self, tree: Any) -> Any:
        """A whole tree on the host of every process."""
        if self.parallel == "pmap":
            return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0))[0], tree)
        if jax.process_count() == 1:
            return jax.device_get(tree)
        whole = jax.jit(lambda leaves: leaves, out_shardings=jax.NamedSharding(self.mesh, jax.P()))(tree)
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), whole)

    def gather(self, tree: Any) -> Any:
        """Inside the step: weights that are split over "fsdp", whole, for the products they are used in."""
        if self.mesh.shape["fsdp"] == 1 or self.parallel == "pmap":
            return tree
        return jax.lax.with_sharding_constraint(tree, jax.NamedSharding(self.mesh, jax.P()))

    def compile(self, step: Callable, split: Sequence[bool | None]) -> Callable[..., Any]:
        """`step(state, …) -> (state, metrics)` over all devices, for arguments placed so; donates the state.

        `split` tells of each argument whether it is a batch (True), or weights or moments (False); None marks what is the same
        small value for all, such as a key. The new state lies where the old one lay.
        """
        if self.parallel == "pmap":
            axes = tuple(None if one is None else 0 for one in split)
            return jax.pmap(
                step, axis_name=_AXIS, in_axes=axes, out_axes=(0, None), donate_argnums=0, devices=list(self.mesh.devices.flat)
            )

        def stay(state: Any, *others: Any) -> tuple[Any, Any]:
            state, metrics = step(state, *others)
            return jax.lax.with_sharding_constraint(state, jax.tree.map(self.sharding, state)), metrics

        compiled = jax.jit(stay, donate_argnums=0)

        # Under the mesh, kernels that the compiler cannot split find it and split themselves. And nothing goes to the devices
        # unasked: what the step reads lies there already.
        def run(*arguments: Any) -> Any:
            with jax.set_mesh(self.mesh), jax.transfer_guard_host_to_device("disallow"):
                return compiled(*arguments)

        def lower(*arguments: Any) -> Any:
            with jax.set_mesh(self.mesh):
                return compiled.lower(*arguments)

        run.lower = lower  # type: ignore[attr-defined]
        return run


def layout(parallel: str = "jit", fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Layout:
    """All devices, or those given, as "data" × "fsdp"; the devices of a process lie side by side, and so do its rows of a batch.

    Errors: `UserError` for a `parallel` other than "jit" or "pmap", and for an `fsdp` that does not divide the devices or, with
    pmap, is not 1.
    """
    if parallel not in PARALLEL:
        raise UserError(f"{parallel!r} is unknown; choose one of {', '.join(PARALLEL)}.", "parallel")
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id))
    if len(devices) % fsdp:
        raise UserError(f"{len(devices)} devices do not divide by {fsdp}; choose a divisor of {len(devices)}.", "fsdp")
    if parallel == "pmap" and fsdp > 1:
        raise UserError("pmap keeps everything whole on every device; choose 1, or parallel jit.", "fsdp")
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=axes)
    return Layout("pmap" if parallel == "pmap" else "jit", mesh)


def layout_for(
    batch_size: int,
    accumulate: int = 1,
    parallel: str = "jit",
    fsdp: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
    argument: str = "batch_size",
    say: Callable[[str], None] = lambda line: None,
) -> Layout:
    """`layout` for batches of this size: of CPU devices, which are cores, over as many as the batch divides by, which is said where
    some stay idle; over all accelerators, and all devices of several processes.

    Errors: `UserError` naming `argument` for a batch that does not divide, and those of `layout`.
    """
    devices = jax.devices() if devices is None else devices
    count = fitting_count(len(devices), batch_size, accumulate, fsdp) if _may_idle(devices) else len(devices)
    where = layout(parallel, fsdp, devices[:count])
    where.check_divides(batch_size, accumulate, argument)
    if count < len(devices):
        used = f"{count} of them {'is' if count == 1 else 'are'} used"
        say(f"A batch of {batch_size} does not divide by {len(devices)} CPU devices: {used}.")
    return where


def fitting_count(devices: int, batch_size: int, accumulate: int = 1, fsdp: int = 1) -> int:
    """The largest number of devices, a multiple of `fsdp`, that splits a batch evenly; all of them where there is none."""
    counts = (count for count in range(devices, 0, -1) if count % fsdp == 0 and batch_size % (count * accumulate) == 0)
    return next(counts, devices)


def _may_idle(devices: Sequence[jax.Device]) -> bool:
    return jax.process_count() == 1 and devices[0].platform == "cpu"
