"""One concept's pure function over any number of concepts: in batches of one size, so that one program serves them all.

    program(shared, own) = one(shared, own_0), one(shared, own_1), …

The axis of concepts is split over this process's devices, and each device computes its share

    side by side    `vmap`: one concept alone does not fill an accelerator
    one by one      `lax.map`, where every device is a core of the CPU: one concept fills a core, several only leave its caches

A batch holds as many concepts as the devices' memory has room for, by what the compiler says of the program, and not more than
gain anything.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from e4t_jax.arrays import same_generator
from e4t_jax.errors import UserError
from e4t_jax.machine import core_count, free_bytes, is_out_of_memory, needed_bytes
from e4t_jax.tuning.kept_programs import kept, made_here

_MOST = {"cpu": 4}  # concepts a device in one call; larger calls gain nothing there (docs/benchmarks.md)
_MOST_ELSEWHERE = 16
_SHARE = 0.9  # of the free memory, which others may want too
_AXIS = "concepts"

# (what all concepts share, one concept's own) -> what comes of it; pure, and of shapes that do not depend on the concept
One = Callable[[Any, Any], Any]


class Batch(NamedTuple):
    """A function of one concept, compiled for `size` of them at once."""

    program: Callable[[Any, Any], Any]
    shared: Sequence[Any]  # its leaves, whole on every device
    size: int
    needed: int  # bytes a device, beside what is shared

    def run(self, rows: Sequence[Any]) -> list[Any]:
        """What comes of each of up to `size` concepts, on the host; the batch is filled up with the last of them."""
        filled = [*rows, *itertools.repeat(rows[-1], self.size - len(rows))]
        own = [np.stack(leaves) for leaves in zip(*map(jax.tree.leaves, filled), strict=True)]
        made = jax.device_get(self.program(self.shared, own))
        return [jax.tree.map(lambda leaf, row=row: leaf[row], made) for row in range(len(rows))]


def fitted(one: One, shared: Any, example: Any, count: int, *, lower: str, static: Any = None) -> Batch:
    """`one` compiled for batches of `count` concepts, or as many as the memory has room for; `example` is a concept's own part.

    `static` is plain data that the program's trace follows from, beside shapes: with it, traces are kept between processes
    (`kept_programs`).

    Errors: `UserError` when there is no room for a single concept; `lower` names the argument that makes it smaller.
    """
    devices = _devices(shared, count)
    each = min(math.ceil(count / len(devices)), _most_each(devices))
    each = 1 << (each - 1).bit_length()  # a power of two: few programs, whatever the number of pictures
    return _fitted(one, shared, example, devices, each=each, lower=lower, static=static)


def _fitted(
    one: One,
    shared: Any,
    example: Any,
    devices: Sequence[jax.Device],
    *,
    each: int,
    lower: str,
    static: Any,
    lanes: int = 1,
) -> Batch:
    """For up to `each` concepts a device, where `lanes` such programs share the devices' memory."""
    program, leaves, own, whole = _flat_program(one, shared, example, devices)
    placed = jax.device_put(leaves, whole)
    if static is not None:
        # Code of others may change without this package's; what is traced from it is not kept.
        traced_here = all(made_here(jax.tree.structure(tree)) for tree in (shared, example))
        static = [one.__module__, one.__qualname__, _one_by_one(devices), static] if traced_here else None
    while True:
        size = each * len(devices)
        arguments = placed, _rows(own, size)
        try:
            with same_generator():
                compiled = kept(program, static, arguments, devices).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = "one concept takes more memory than the device has"
        else:
            needed, free = needed_bytes(compiled), free_bytes(devices) * _SHARE / lanes
            if needed <= free:
                return Batch(compiled, placed, size, needed)
            reason = f"one concept takes {needed / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free"
        if each == 1:
            raise UserError(f"{reason}; lower it.", lower)
        each //= 2


def fitted_lanes(one: One, shared: Any, example: Any, most: int | None, *, lower: str, static: Any = None) -> list[list[Batch]]:
    """`one` compiled for calls that come when they come: programs that may run beside each other, each in several sizes.

    Where every device takes concepts one by one and `most` is not given, each has a program of its own, for a single concept: so
    none waits for what another computes. Else there is one lane on all devices, for batches of some `most` concepts, of half
    as many, and so on down to a single one; smallest first.

    Errors: as `fitted`.
    """
    devices = _devices(shared, at_once())
    if most is None and _one_by_one(devices):
        fit = functools.partial(_fitted, one, shared, example, each=1, lower=lower, static=static, lanes=len(devices))
        return [[fit([device])] for device in devices]
    sizes = [fitted(one, shared, example, most or at_once(), lower=lower, static=static)]
    # Placed once: where programs run on the same devices, they read the same weights.
    placed = jax.tree.unflatten(jax.tree.structure(shared), sizes[0].shared)
    while sizes[-1].size > 1:
        sizes.append(fitted(one, placed, example, sizes[-1].size // 2, lower=lower, static=static))
    return [sizes[::-1]]


def at_once() -> int:
    """How many concepts this process's devices compute at the same time; more of them in one call wait for each other."""
    devices = jax.local_devices()
    return len(devices) * (1 if _one_by_one(devices) else _most_each(devices))


def over(
    one: One, shared: Any, rows: Iterable[tuple[Any, Any | None]], count: int, *, lower: str, static: Any = None
) -> Iterator[tuple[Any, Any | None]]:
    """(label, what comes of it) for each (label, own part) of up to `count` rows, a batch at a time, none read before its turn.

    A row whose own part is None goes through as it is, at once. Own parts of another structure or of other shapes begin another
    batch. Where a device runs out of memory all the same, batches of half the size take over.

    Errors: as `fitted`.
    """
    compiled: dict[Any, Batch] = {}
    waiting: list[tuple[Any, Any]] = []
    kind = None

    def made() -> Iterator[tuple[Any, Any]]:
        labels, own = zip(*waiting, strict=True)
        waiting.clear()
        return zip(labels, run(own), strict=True)

    def run(own: Sequence[Any]) -> list[Any]:
        batch = compiled[kind]
        try:
            return [made for first in range(0, len(own), batch.size) for made in batch.run(own[first : first + batch.size])]
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if batch.size == 1:
            raise UserError("one concept takes more memory than the device has; lower it.", lower) from None
        compiled[kind] = fitted(one, shared, own[0], batch.size // 2, lower=lower, static=static)
        return run(own)

    for label, own in rows:
        if own is None:
            yield label, None
            continue
        leaves, structure = jax.tree.flatten(own)
        its_kind = structure, *(np.shape(leaf) for leaf in leaves)
        if waiting and its_kind != kind:
            yield from made()
        kind = its_kind
        if kind not in compiled:
            compiled[kind] = fitted(one, shared, own, count, lower=lower, static=static)
        waiting.append((label, own))
        if len(waiting) == compiled[kind].size:
            yield from made()
    if waiting:
        yield from made()


@functools.cache
def _program(one: One, shared: Any, own: Any, mesh: jax.sharding.Mesh, one_by_one: bool) -> Any:
    """`one` over a batch, as a function of the leaves of trees of these structures."""

    def share(leaves: Sequence[Any], rows: Sequence[Any]) -> Any:
        def each(row: Sequence[Any]) -> Any:
            return one(jax.tree.unflatten(shared, leaves), jax.tree.unflatten(own, row))

        return jax.lax.map(each, rows) if one_by_one else jax.vmap(each)(rows)

    # Varying axes are not checked: what a concept starts from is the same everywhere, what it becomes is not.
    return jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(jax.P(), jax.P(_AXIS)), out_specs=jax.P(_AXIS), check_vma=False))


def lowered(one: One, shared: Any, example: Any, devices: Sequence[Any], each: int) -> jax.stages.Lowered:
    """The very program that `over` runs for `each` concepts a device, lowered for devices that need not be there.

    Leaves of `shared` and `example` may be shapes (`jax.ShapeDtypeStruct`): nothing is allocated.
    """
    program, leaves, own, whole = _flat_program(one, shared, example, devices)
    shapes = jax.eval_shape(lambda *each: each, *leaves)
    placed = [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=whole, weak_type=one.weak_type) for one in shapes]
    with same_generator():
        return program.lower(placed, _rows(own, each * len(devices)))


def _flat_program(
    one: One, shared: Any, example: Any, devices: Sequence[Any]
) -> tuple[Any, list[Any], list[Any], jax.sharding.NamedSharding]:
    """`one` over a batch as a function of leaves; the leaves of `shared` and of `example`; and where the former are to lie."""
    mesh = jax.sharding.Mesh(np.array(devices), (_AXIS,))
    leaves, structure = jax.tree.flatten(shared)
    own, own_structure = jax.tree.flatten(example)
    program = _program(one, structure, own_structure, mesh, _one_by_one(devices))
    return program, leaves, own, jax.sharding.NamedSharding(mesh, jax.P())


def _rows(own: Sequence[Any], count: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes of `count` concepts' own parts."""
    return [jax.ShapeDtypeStruct((count, *np.shape(leaf)), leaf.dtype) for leaf in own]


def _devices(shared: Any, count: int) -> list[jax.Device]:
    """This process's devices: not more than concepts, nor, where they share one memory, than half of it holds the weights for."""
    devices = jax.local_devices()[:count]
    if devices[0].platform == "cpu":
        copies = free_bytes(devices[:1]) // max(2 * sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(shared)), 1)
        devices = devices[: max(int(copies), 1)]
    return devices


def _most_each(devices: Sequence[jax.Device]) -> int:
    return _MOST.get(devices[0].platform, _MOST_ELSEWHERE)


def _one_by_one(devices: Sequence[jax.Device]) -> bool:
    return devices[0].platform == "cpu" and jax.local_device_count() >= core_count()
