"""The ten contexts, each a function of picture coordinates and six random numbers of scenery."""

from __future__ import annotations

from functools import reduce

import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.creatures.world import shapes
from e4t_jax.creatures.world.shapes import Field

Picture = Float[Array, "height width 3"]


def colour(red: float, green: float, blue: float) -> Float[Array, "3"]:
    """An RGB colour in [0, 1]."""
    return jnp.array([red, green, blue], jnp.float32)


def over(picture: Picture, paint, alpha: Field) -> Picture:
    """Paints over a picture with coverage `alpha`."""
    return picture + (paint - picture) * alpha[..., None]


def _fade(top, bottom, y: Field) -> Picture:
    return top + (bottom - top) * jnp.clip(y * 0.5 + 0.5, 0, 1)[..., None]


def _ground(picture: Picture, y: Field, edge, paint, pixel) -> Picture:
    return over(picture, paint, shapes.cover(edge - y, pixel))


def _dots(x: Field, y: Field, cell, radius, shift, pixel) -> Field:
    row = jnp.floor(y / cell)
    column = jnp.floor((x + shift) / cell + 0.5 * (row % 2))
    wobble_x, wobble_y = jnp.sin(12.9 * column + 78.2 * row), jnp.sin(39.3 * column + 11.1 * row)
    dx = (x + shift) - (column - 0.5 * (row % 2) + 0.5 + 0.3 * wobble_x) * cell
    dy = y - (row + 0.5 + 0.3 * wobble_y) * cell
    return shapes.cover(shapes.circle(dx, dy, radius * (1 + 0.4 * wobble_x)), pixel)


def _snow(x, y, s, pixel):
    picture = _fade(colour(0.55, 0.72, 0.92), colour(0.85, 0.92, 1.0), y)
    picture = _ground(picture, y, 0.1 + 0.1 * jnp.sin(2.5 * x + 6 * s[0]), colour(0.8, 0.87, 0.97), pixel)
    picture = _ground(picture, y, 0.35 + 0.07 * jnp.sin(2 * x + 6 * s[1]), colour(0.97, 0.98, 1.0), pixel)
    return over(picture, colour(1, 1, 1), _dots(x, y, 0.4, 0.05, shift=s[2], pixel=pixel))


def _beach(x, y, s, pixel):
    picture = _fade(colour(0.35, 0.72, 0.98), colour(0.8, 0.95, 1.0), y)
    sun = shapes.circle(x - 1.2 * (s[0] - 0.5), y + 0.72, 0.16)
    picture = over(picture, colour(1, 0.95, 0.55), shapes.cover(sun, pixel))
    picture = _ground(picture, y, -0.05, colour(0.1, 0.5, 0.78), pixel)
    picture = _ground(picture, y, 0.27 + 0.05 * jnp.sin(4 * x + 6 * s[1]), colour(0.96, 0.97, 0.95), pixel)
    return _ground(picture, y, 0.34 + 0.05 * jnp.sin(4 * x + 6 * s[1]), colour(0.96, 0.84, 0.58), pixel)


def _forest(x, y, s, pixel):
    picture = _fade(colour(0.5, 0.72, 0.5), colour(0.25, 0.45, 0.25), y)
    for row, (size, paint) in enumerate([(0.24, colour(0.2, 0.47, 0.27)), (0.32, colour(0.09, 0.33, 0.17))]):
        spacing = 0.46
        offset = (x + s[row] * spacing + spacing / 2) % spacing - spacing / 2
        tree = shapes.spike(offset, y - 0.35 + 0.12 * row, size * 0.8, 1.15 - 0.25 * row)
        picture = over(picture, paint, shapes.cover(tree, pixel))
    return _ground(picture, y, 0.36 + 0.04 * jnp.sin(5 * x + 6 * s[2]), colour(0.3, 0.24, 0.13), pixel)


def _city(x, y, s, pixel):
    picture = _fade(colour(0.72, 0.74, 0.8), colour(0.93, 0.85, 0.78), y)
    column = jnp.floor((x + s[0] * 0.5) / 0.5)
    height = 0.35 + 0.45 * jnp.abs(jnp.sin(column * 2.7 + 9 * s[1]))
    inside = ((x + s[0] * 0.5) / 0.5 - column - 0.5) * 0.5
    tower = shapes.box(inside, y - 0.5, 0.22, 0.55 + height)
    picture = over(picture, colour(0.4, 0.42, 0.5), shapes.cover(tower, pixel))
    wx, wy = (inside + 0.22) % 0.22 - 0.11, (y + 0.02) % 0.25 - 0.125
    window = jnp.maximum(shapes.box(wx, wy, 0.06, 0.075), tower + 0.03)
    picture = over(picture, colour(0.98, 0.9, 0.55), shapes.cover(window, pixel))
    return _ground(picture, y, 0.42, colour(0.33, 0.33, 0.36), pixel)


def _desert(x, y, s, pixel):
    picture = _fade(colour(0.98, 0.78, 0.5), colour(1.0, 0.93, 0.75), y)
    picture = _ground(picture, y, 0.08 + 0.13 * jnp.sin(2.2 * x + 6 * s[0]), colour(0.9, 0.66, 0.36), pixel)
    picture = _ground(picture, y, 0.36 + 0.1 * jnp.sin(1.7 * x + 6 * s[1]), colour(0.8, 0.53, 0.26), pixel)
    side = jnp.sign(s[2] - 0.5) * 0.75
    cactus = jnp.minimum(
        shapes.segment(x, y, (side, -0.25), (side, 0.45), 0.07), shapes.segment(x, y, (side, 0.1), (side + 0.17, -0.05), 0.05)
    )
    return over(picture, colour(0.25, 0.5, 0.25), shapes.cover(cactus, pixel))


def _space(x, y, s, pixel):
    picture = _fade(colour(0.02, 0.02, 0.1), colour(0.16, 0.06, 0.26), y + 0.4 * x)
    picture = over(picture, colour(1, 1, 0.9), _dots(x, y, 0.3, 0.03, shift=s[0], pixel=pixel))
    px, py = x - jnp.sign(s[2] - 0.5) * 0.62, y + 0.6
    picture = over(picture, colour(0.85, 0.6, 0.45), shapes.cover(shapes.circle(px, py, 0.2), pixel))
    ring = jnp.abs(shapes.superellipse(px, py + 0.3 * px, 0.34, 0.09)) - 0.02
    picture = over(picture, colour(0.95, 0.85, 0.7), shapes.cover(ring, pixel))
    return _ground(picture, y, 0.55 + 0.12 * x * x, colour(0.45, 0.44, 0.5), pixel)


def _sea(x, y, s, pixel):
    picture = _fade(colour(0.2, 0.72, 0.85), colour(0.02, 0.2, 0.48), y)
    rays = jnp.clip(jnp.sin(5 * (x + 0.4 * y) + 6 * s[0]), 0, 1) * jnp.clip(0.2 - y, 0, 1) * 0.6
    picture = over(picture, colour(0.7, 0.95, 1.0), rays)
    for index in range(3):
        bubble = shapes.circle(x - 1.7 * (s[index] - 0.5), y + 0.75 - 0.35 * index - 0.2 * s[3], 0.07)
        picture = over(picture, colour(0.85, 0.97, 1.0), shapes.cover(jnp.abs(bubble) - 0.018, pixel))
    weed = jnp.abs((x + 0.06 * jnp.sin(9 * y) + s[4] * 0.5) % 0.5 - 0.25) - 0.045
    picture = over(picture, colour(0.1, 0.5, 0.35), shapes.cover(jnp.maximum(weed, 0.3 - y), pixel))
    return _ground(picture, y, 0.78, colour(0.75, 0.68, 0.48), pixel)


def _meadow(x, y, s, pixel):
    picture = _fade(colour(0.5, 0.8, 1.0), colour(0.9, 0.97, 1.0), y)
    for index in range(2):
        cx, cy = x - 1.6 * (s[index] - 0.5), y + 0.72 - 0.22 * index
        cloud = jnp.minimum(shapes.superellipse(cx, cy, 0.26, 0.08), shapes.circle(cx - 0.03, cy + 0.05, 0.1))
        picture = over(picture, colour(1, 1, 1), shapes.cover(cloud, pixel))
    picture = _ground(picture, y, 0.08 + 0.1 * jnp.sin(2 * x + 6 * s[2]), colour(0.55, 0.8, 0.38), pixel)
    picture = _ground(picture, y, 0.32 + 0.06 * jnp.sin(2.4 * x + 6 * s[3]), colour(0.4, 0.7, 0.25), pixel)
    gx, gy = (x + s[4] * 0.35) % 0.35 - 0.175, (y + 0.1) % 0.27 - 0.135
    flower = jnp.maximum(shapes.circle(gx, gy, 0.05), 0.42 - y)
    return over(picture, colour(1.0, 0.95, 0.98), shapes.cover(flower, pixel))


def _room(x, y, s, pixel):
    stripes = 0.5 + 0.5 * jnp.sign(jnp.sin(14 * x + 6 * s[0]))
    picture = colour(0.93, 0.85, 0.8) + (colour(0.87, 0.76, 0.72) - colour(0.93, 0.85, 0.8)) * stripes[..., None]
    wx, wy = x - jnp.sign(s[1] - 0.5) * 0.6, y + 0.5
    picture = over(picture, colour(0.45, 0.28, 0.18), shapes.cover(shapes.box(wx, wy, 0.27, 0.3), pixel))
    picture = over(picture, colour(0.7, 0.88, 0.98), shapes.cover(shapes.box(wx, wy, 0.21, 0.24), pixel))
    bars = jnp.maximum(jnp.minimum(jnp.abs(wx), jnp.abs(wy)) - 0.025, shapes.box(wx, wy, 0.24, 0.27))
    picture = over(picture, colour(0.45, 0.28, 0.18), shapes.cover(bars, pixel))
    picture = _ground(picture, y, 0.38, colour(0.98, 0.95, 0.9), pixel)
    return _ground(picture, y, 0.45, colour(0.6, 0.38, 0.23), pixel)


def _sunset(x, y, s, pixel):
    picture = _fade(colour(0.35, 0.12, 0.42), colour(1.0, 0.62, 0.2), y + 0.35)
    sun = shapes.circle(x - 0.9 * (s[0] - 0.5), y - 0.02, 0.36)
    picture = over(picture, colour(1.0, 0.85, 0.35), shapes.cover(sun, pixel))
    ridge = jnp.abs((x + s[1]) % 0.9 - 0.45) * 0.7
    picture = _ground(picture, y, -0.02 + ridge, colour(0.4, 0.13, 0.3), pixel)
    return _ground(picture, y, 0.38 + 0.04 * jnp.sin(3 * x + 6 * s[2]), colour(0.2, 0.07, 0.18), pixel)


_PAINTERS = (_snow, _beach, _forest, _city, _desert, _space, _sea, _meadow, _room, _sunset)


def paint_background(context, x: Field, y: Field, scenery: Float[Array, "6"], pixel) -> Picture:
    """The scenery of context number `context` (order of `attributes.CONTEXTS`)."""
    painted = (jnp.where(context == index, 1.0, 0.0) * paint(x, y, scenery, pixel) for index, paint in enumerate(_PAINTERS))
    return reduce(jnp.add, painted)
