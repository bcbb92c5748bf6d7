"""Numbers in a few bits each, with one scale for all of a tensor.

    x ≈ s c,    c ∈ {±1/2, ±3/2, …, ±(2^bits - 1)/2}

A number's level is its sign and m = ⌊|x| / s⌋, at most 2^(bits-1) - 1. The scale is the one of the least Σ (x - s c)², exactly:
as s falls, m of x becomes k at s = |x| / k and at no other moment, so all codes that some scale gives come up in the order of
|x| / k. Of each, the best scale is Σ x c / Σ c², which leaves Σ x² - (Σ x c)² / Σ c².
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8


def quantise(x: Float[np.ndarray, "..."], bits: int) -> tuple[UInt8[np.ndarray, "..."], np.float32]:
    """(codes from 0 to 2^bits - 1, s): the nearest levels of the least-squares scale; s = 0 where all is 0. 1 to 8 bits."""
    scale = np.float32(_best_scale(np.abs(x, dtype=np.float64).ravel(), bits))
    half = 1 << (bits - 1)
    steps = np.floor(np.abs(x, dtype=np.float64) / scale) if scale else np.zeros(x.shape)
    steps = np.minimum(steps, half - 1)
    return np.where(x < 0, half - 1 - steps, half + steps).astype(np.uint8), scale


def dequantise(codes: UInt8[np.ndarray, "..."], scale: np.float32, bits: int) -> Float[np.ndarray, "..."]:
    """s c, in float32."""
    return scale * (codes.astype(np.float32) - np.float32((2**bits - 1) / 2))


def pack_bits(codes: UInt8[np.ndarray, " numbers"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Codes one after the other, `bits` each, the lowest first; the last byte is filled up with zeros."""
    return np.packbits((codes[:, None] >> np.arange(bits)) & 1)


def unpack_bits(packed: UInt8[np.ndarray, " bytes"], bits: int, count: int) -> UInt8[np.ndarray, " numbers"]:
    """The first `count` codes that `pack_bits` packed.

    Errors: `ValueError` when there are more bytes or fewer than so many take.
    """
    if len(packed) != math.ceil(count * bits / 8):
        raise ValueError(f"{count} numbers of {bits} bits are not {len(packed)} bytes")
    found = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return (found << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)


def _best_scale(size: Float[np.ndarray, " numbers"], bits: int) -> float:
    """The least-squares scale of numbers of these absolute values."""
    steps = np.arange(1, 1 << (bits - 1))
    moments, numbers, reached = (size[:, None] / steps).ravel(), np.repeat(size, len(steps)), np.tile(steps, len(size))
    order = np.argsort(-moments)
    # From all at ±1/2 on: at each moment one |c| grows from k - 1/2 to k + 1/2.
    products = size.sum() / 2 + np.concatenate([[0.0], np.cumsum(numbers[order])])
    squares = len(size) / 4 + np.concatenate([[0.0], np.cumsum(2.0 * reached[order])])
    best = np.argmax(products**2 / squares)
    return float(products[best] / squares[best])
