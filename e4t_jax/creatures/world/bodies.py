"""The four classes as stacks of parts: the creature with its seventeen attributes, a fish with eleven, a house and a tree.

A part is a shape with a colour. Parts are given from back to front in a frame where the figure spans about [-1, 1].
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.creatures.world import shapes
from e4t_jax.creatures.world.backgrounds import colour
from e4t_jax.creatures.world.shapes import Field

_PALETTE = (
    (0.87, 0.17, 0.17),
    (0.96, 0.53, 0.12),
    (0.98, 0.86, 0.22),
    (0.33, 0.72, 0.22),
    (0.10, 0.70, 0.66),
    (0.17, 0.38, 0.88),
    (0.50, 0.24, 0.78),
    (0.97, 0.52, 0.74),
)
_ABSENT = 9.0  # a distance so large that nothing of the part is seen


class Part(NamedTuple):
    """One shape of a figure."""

    distance: Field
    paint: Float[Array, "... 3"]
    lined: bool = True  # drawn with an outline in the styles that have one


def paint_of_hue(hue, lightness=0.0) -> Float[Array, "3"]:
    """The palette's colour at `hue` in [0, 1), blended between its eight anchors, towards black (-1) or white (+1)."""
    anchors = jnp.array(_PALETTE, jnp.float32)
    position = hue * len(_PALETTE)
    low = jnp.floor(position)
    first, second = anchors[low.astype(int) % 8], anchors[(low.astype(int) + 1) % 8]
    paint = first + (second - first) * (position - low)
    pale, dark = jnp.clip(lightness, 0, 1) * 0.5, jnp.clip(-lightness, 0, 1) * 0.5
    return (paint + (1 - paint) * pale) * (1 - dark)


def _only(condition, distance: Field) -> Field:
    return jnp.where(condition, distance, _ABSENT)


def _body(x: Field, y: Field, who) -> tuple[Field, Float[Array, ""], Float[Array, ""]]:
    shape, aspect = who["shape"], who["aspect"]
    a = jnp.array([0.66, 0.62, 0.52, 0.80, 0.68])[shape.astype(int)] * (1 + 0.06 * aspect)
    b = jnp.array([0.66, 0.62, 0.80, 0.52, 0.70])[shape.astype(int)] * (1 - 0.06 * aspect)
    power = jnp.array([2.0, 5.0, 2.5, 2.5, 2.0])[shape.astype(int)]
    narrow = jnp.where(shape == 4, 1.0 - 0.42 * y, 1.0)
    return shapes.superellipse(x * narrow, y, a, b, power), a, b


def _spots(x: Field, y: Field, phase) -> Field:
    sx, sy = x + 0.5 * phase, y + 0.33 * phase
    row = jnp.floor(sy / 0.34)
    return shapes.circle((sx + 0.21 * (row % 2)) % 0.42 - 0.21, sy % 0.34 - 0.17, 0.115)


def creature(x: Field, y: Field, who, mood) -> tuple[list[Part], Field]:
    """Parts of the creature `who` at coordinates (x, y), and the distance of its body; `mood` in [0, 1] bends the smile."""
    y = y - 0.12
    body, a, b = _body(x, y, who)
    skin, trim = paint_of_hue(who["body_hue"], who["lightness"]), paint_of_hue(who["trim_hue"])
    cream, ink = colour(0.98, 0.94, 0.82), colour(0.10, 0.08, 0.10)
    left = jnp.abs(x)
    size, ears = who["ear_size"], who["ears"]
    top = -b

    tail = shapes.segment(x, y, (a * 0.7, b * 0.55), (a + 0.33, 0.1), 0.09)
    tail_tip = shapes.circle(x - a - 0.33, y - 0.05, 0.15)
    parts = [
        Part(_only(who["tail"] == 1, tail), skin),
        Part(_only(who["tail"] == 1, tail_tip), trim),
        Part(_only(who["feet"] == 1, shapes.superellipse(left - a * 0.5, y - b - 0.02, 0.22, 0.14)), skin * 0.82),
    ]

    ear_x, ear_y = left - a * 0.62, y - top * 0.75
    tilted_x, tilted_y = shapes.rotate(ear_x, ear_y, 0.45)
    bear = shapes.circle(ear_x - 0.03, ear_y + 0.08, 0.27 * size)
    cat = shapes.spike(tilted_x, tilted_y - 0.05, 0.25 * size, 0.52 * size)
    bunny = shapes.superellipse(left - a * 0.38, y - top * 0.9 + 0.36 * size, 0.14 * size, 0.5 * size)
    horn = shapes.spike(*shapes.rotate(ear_x - 0.02, ear_y - 0.02, 0.75), 0.17 * size, 0.62 * size)
    stalk = shapes.segment(left, y, (a * 0.2, top * 0.8), (a * 0.5, top - 0.42 * size), 0.045)
    ball = shapes.circle(left - a * 0.5, y - top + 0.42 * size, 0.14 * size)
    furry = jnp.select([ears == 1, ears == 2, ears == 3], [bear, cat, bunny], _ABSENT)
    inner = jnp.select([ears == 1, ears == 2, ears == 3], [bear + 0.12, cat + 0.12, bunny + 0.08], _ABSENT)
    parts += [
        Part(furry, skin),
        Part(inner, trim, lined=False),
        Part(_only(ears == 4, horn), cream),
        Part(_only(ears == 5, stalk), ink),
        Part(_only(ears == 5, ball), trim),
        Part(body, skin),
    ]

    phase = who["pattern_phase"]
    spots = _spots(x, y, phase)
    stripes = jnp.abs((y + 0.3 * phase) % 0.34 - 0.17) - 0.085
    belly = shapes.superellipse(x, y - b * 0.62, a * 0.62, b * 0.52)
    mask = shapes.superellipse(x, y + 0.16, a * 1.2, 0.27 + 0.05 * phase)
    pattern = who["pattern"]
    marks = jnp.select([pattern == 1, pattern == 2, pattern == 3, pattern == 4], [spots, stripes, belly, mask], _ABSENT)
    parts.append(Part(jnp.maximum(marks, body + 0.02), trim, lined=False))

    eyes = who["eyes"]
    radius = jnp.array([0.31, 0.215, 0.18])[eyes.astype(int)] * who["eye_size"]
    apart = jnp.array([0.0, 0.26, 0.3])[eyes.astype(int)]
    eye_y = y + jnp.where(eyes == 2, 0.06, 0.16)
    third = 0.3  # above the other two: a triangle is told from a pair at a glance, a row is not
    side = jnp.minimum(shapes.circle(left - apart, eye_y, radius), _ABSENT)
    white = jnp.where(eyes == 2, jnp.minimum(side, shapes.circle(x, eye_y + third, radius)), side)

    def pupil(r):
        both = shapes.circle(left - apart * 0.93, eye_y - 0.02, r)
        return jnp.where(eyes == 2, jnp.minimum(both, shapes.circle(x, eye_y + third - 0.02, r)), both)

    iris = paint_of_hue(0.3 + 0.35 * who["iris"], -0.3)
    glint = shapes.circle(left - apart * 0.93 + radius * 0.2, eye_y + radius * 0.25, radius * 0.22)
    parts += [
        Part(white, colour(1, 1, 1)),
        Part(pupil(radius * 0.66), iris, lined=False),
        Part(pupil(radius * 0.4), ink, lined=False),
        Part(glint, colour(1, 1, 1), lined=False),
        Part(_only(who["cheeks"] == 1, shapes.circle(left - a * 0.6, y - 0.12, 0.12)), colour(1, 0.45, 0.5), lined=False),
    ]

    mouth, mouth_y = who["mouth"], y - 0.2
    grin = shapes.smile(x, mouth_y, 0.23, 0.05 + 0.12 * mood, 0.038)
    shout = shapes.superellipse(x, mouth_y - 0.08, 0.19, 0.10 + 0.08 * mood)
    tongue = jnp.maximum(shapes.circle(x, mouth_y - 0.22, 0.12), shout + 0.01)
    fangs = shapes.spike(left - 0.12, -(mouth_y - 0.1), 0.07, 0.17)
    beak = shapes.spike(x, -(mouth_y + 0.05), 0.19, 0.34)
    parts += [
        Part(jnp.select([(mouth == 0) | (mouth == 2), mouth == 1], [grin, shout], _ABSENT), ink, lined=False),
        Part(_only(mouth == 1, tongue), colour(0.95, 0.4, 0.45), lined=False),
        Part(_only(mouth == 2, fangs), colour(1, 1, 1)),
        Part(_only(mouth == 3, beak), colour(1.0, 0.68, 0.1)),
    ]

    hat = who["hat"]
    brim = shapes.box(x, y - top + 0.02, 0.4, 0.06)
    tall_hat = jnp.minimum(brim, shapes.box(x, y - top + 0.24, 0.26, 0.24))
    zigzag = 0.2 - 0.12 * jnp.abs(((x + 0.11) % 0.22) / 0.11 - 1.0)
    crown = jnp.maximum(shapes.box(x, y - top + 0.1, 0.33, 0.24), -(y - top) - 0.42 + zigzag)
    scarf = jnp.minimum(
        jnp.maximum(jnp.abs(y - b * 0.66 + 0.1 * x * x) - 0.1, body - 0.04),
        shapes.box(x - a * 0.4, y - b * 0.66 - 0.14, 0.09, 0.14),
    )
    bow = jnp.minimum(jnp.maximum(left - 0.3, jnp.abs(y - b * 0.8) - 0.05 - 0.42 * left), shapes.circle(x, y - b * 0.8, 0.09))
    parts += [
        Part(_only(hat == 1, tall_hat), colour(0.17, 0.15, 0.2)),
        Part(_only(hat == 1, shapes.box(x, y - top + 0.1, 0.26, 0.05)), trim, lined=False),
        Part(_only(hat == 2, crown), colour(1.0, 0.8, 0.15)),
        Part(_only(hat == 3, scarf), trim),
        Part(_only(hat == 4, bow), trim),
    ]
    return parts, body


def house(x: Field, y: Field, who) -> tuple[list[Part], Field]:
    """A house: walls in the body hue, roof in the trim hue."""
    walls = shapes.box(x, y - 0.35, 0.62, 0.5)
    window = shapes.box(jnp.abs(x) - 0.36, y - 0.15, 0.14, 0.14)
    parts = [
        Part(shapes.box(x - 0.38, y + 0.55, 0.1, 0.25), colour(0.5, 0.35, 0.3)),
        Part(walls, paint_of_hue(who["body_hue"], who["lightness"])),
        Part(shapes.spike(x, y + 0.15, 0.85, 0.7), paint_of_hue(who["trim_hue"])),
        Part(shapes.box(x, y - 0.58, 0.15, 0.27), colour(0.4, 0.25, 0.15)),
        Part(window, colour(0.98, 0.95, 0.65)),
    ]
    return parts, walls


def fish(x: Field, y: Field, who) -> tuple[list[Part], Field]:
    """A fish, seen from its left: body, pattern and back fin are the creature's shape, pattern and ears in a fish's way.

    Its tail is a fan, or a fork where a creature has a tail; fins and patterns are in the trim hue.
    """
    x = x + 0.14
    shape = who["shape"].astype(int)
    a = jnp.array([0.54, 0.6, 0.42, 0.72, 0.62])[shape] * (1 + 0.06 * who["aspect"])
    b = jnp.array([0.46, 0.4, 0.62, 0.3, 0.46])[shape] * (1 - 0.06 * who["aspect"])
    power = jnp.array([2.0, 4.0, 2.2, 2.2, 2.0])[shape]
    narrow = jnp.where(shape == 4, 1.0 + 0.55 * x, 1.0)
    body = shapes.superellipse(x, y * narrow, a, b, power)
    skin, trim, ink = paint_of_hue(who["body_hue"], who["lightness"]), paint_of_hue(who["trim_hue"]), colour(0.1, 0.08, 0.1)

    behind = x - a - 0.42
    fan = shapes.spike(y, behind, 0.42, 0.58)
    fork = jnp.maximum(fan, -shapes.spike(y, behind - 0.01, 0.3, 0.3))
    size, ears, back = who["ear_size"], who["ears"], y + b
    round_fin = jnp.maximum(shapes.circle(x, back - 0.06, 0.3 * size), -body)
    sharp_fin = shapes.spike(x - 0.1, back - 0.12, 0.26 * size, 0.5 * size)
    long_fin = shapes.superellipse(x - 0.05, back + 0.1 * size, 0.15 * size, 0.44 * size)
    row = jnp.clip(jnp.round(x / 0.26), -1, 1) * 0.26
    spines = shapes.spike(x - row, back - 0.1, 0.11, 0.36 * size)
    stalk = shapes.segment(x, y, (-0.2, 0.05 - b), (-0.62, -b - 0.3 * size), 0.045)
    lure = shapes.circle(x + 0.62, y + b + 0.3 * size, 0.14 * size)
    parts = [
        Part(jnp.where(who["tail"] == 1, fork, fan), trim),
        Part(jnp.select([ears == 1, ears == 2, ears == 3, ears == 4], [round_fin, sharp_fin, long_fin, spines], _ABSENT), trim),
        Part(_only(ears == 5, stalk), ink),
        Part(_only(ears == 5, lure), trim),
        Part(body, skin),
    ]

    phase = who["pattern_phase"]
    marks = jnp.select(
        [who["pattern"] == kind for kind in (1, 2, 3, 4)],
        [
            _spots(x, y, phase),
            jnp.abs((x + 0.3 * phase) % 0.34 - 0.17) - 0.085,
            shapes.superellipse(x, y - b * 0.9, a * 0.9, b * 0.85),
            shapes.box(x + a, y, 0.42 * a + 0.08 * phase, 1.0),
        ],
        _ABSENT,
    )
    eye_x, eye_y, radius = x + a * 0.52, y + b * 0.2, 0.16 * who["eye_size"]
    parts += [
        Part(jnp.maximum(marks, body + 0.02), trim, lined=False),
        Part(shapes.circle(eye_x, eye_y, radius), colour(1, 1, 1)),
        Part(shapes.circle(eye_x + 0.02, eye_y, radius * 0.55), ink, lined=False),
    ]
    return parts, body


def tree(x: Field, y: Field, who) -> tuple[list[Part], Field]:
    """A tree: crown in the body hue, fruit in the trim hue."""
    lobes = jnp.minimum(shapes.circle(x, y + 0.45, 0.5), shapes.circle(jnp.abs(x) - 0.36, y + 0.12, 0.38))
    fruit = shapes.circle(jnp.abs(x) - 0.3, y + 0.15, 0.1)
    fruit = jnp.minimum(fruit, shapes.circle(x, y + 0.55, 0.1))
    parts = [
        Part(shapes.box(x, y - 0.55, 0.13, 0.45), colour(0.45, 0.29, 0.16)),
        Part(lobes, paint_of_hue(who["body_hue"], who["lightness"])),
        Part(_only(who["pattern"] == 1, fruit), paint_of_hue(who["trim_hue"])),
    ]
    return parts, lobes
