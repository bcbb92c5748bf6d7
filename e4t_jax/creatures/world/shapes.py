"""Signed distances of the few shapes everything is drawn with; negative inside, in units of the picture's half width."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array

Field = Float[Array, "height width"]


def rotate(x: Field, y: Field, angle) -> tuple[Field, Field]:
    """Coordinates in a frame turned by `angle` (radians)."""
    return jnp.cos(angle) * x + jnp.sin(angle) * y, -jnp.sin(angle) * x + jnp.cos(angle) * y


def superellipse(x: Field, y: Field, a, b, power=2.0) -> Field:
    """|x/a|^p + |y/b|^p = 1: an ellipse at p = 2, a rounded box above; the distance is approximate off the edge."""
    level = (jnp.abs(x / a) ** power + jnp.abs(y / b) ** power + 1e-9) ** (1.0 / power)
    return (level - 1.0) * jnp.minimum(a, b)


def circle(x: Field, y: Field, radius) -> Field:
    """Distance to a circle around the origin."""
    return jnp.sqrt(x * x + y * y + 1e-9) - radius


def box(x: Field, y: Field, a, b) -> Field:
    """Chebyshev distance to the box |x| <= a, |y| <= b."""
    return jnp.maximum(jnp.abs(x) - a, jnp.abs(y) - b)


def spike(x: Field, y: Field, width, height) -> Field:
    """An isosceles triangle: base of half-width `width` on y = 0, tip at y = -height."""
    slope = jnp.sqrt(width**2 + height**2)
    side = (jnp.abs(x) * height + (y + height) * -width) / slope
    return jnp.maximum(side, y)


def segment(x: Field, y: Field, start: tuple, end: tuple, radius) -> Field:
    """A line of the given half thickness from `start` to `end`, each (x, y)."""
    (x0, y0), (x1, y1) = start, end
    dx, dy = x1 - x0, y1 - y0
    along = jnp.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
    return circle(x - x0 - along * dx, y - y0 - along * dy, radius)


def smile(x: Field, y: Field, width, bend, radius) -> Field:
    """A parabola arc over |x| <= width, its middle lower than its ends by `bend`."""
    curve = y - bend * (1.0 - (x / width) ** 2)
    steep = jnp.sqrt(1.0 + (2 * bend * x / width**2) ** 2)
    return jnp.maximum(jnp.abs(curve) / steep - radius, jnp.abs(x) - width)


def cover(distance: Field, pixel) -> Field:
    """Anti-aliased coverage in [0, 1] of a shape, one pixel wide at its edge."""
    return jnp.clip(0.5 - distance / pixel, 0.0, 1.0)
