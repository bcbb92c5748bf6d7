"""The drawn world: (identity, scene) -> picture and mask, deterministic, by signed distances in JAX."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from e4t_jax.arrays import Array
from e4t_jax.creatures.world import bodies, shapes
from e4t_jax.creatures.world.attributes import CLASSES, Record, take
from e4t_jax.creatures.world.backgrounds import Picture, colour, over, paint_background
from e4t_jax.creatures.world.shapes import Field

IMAGE_SIZE = 32
_CHUNK = 256

# style (order of attributes.STYLES): outline strength, volume shading, how far colours fade to paper, hatching, mottling
_OUTLINE = (0.0, 1.0, 0.35, 0.85)
_VOLUME = (1.0, 0.0, 0.25, 0.2)
_PAPER = (0.0, 0.0, 0.28, 0.25)
_HATCH = (0.0, 0.0, 0.0, 1.0)
_MOTTLE = (0.0, 0.0, 1.0, 0.0)


def _paint_figure(picture: Picture, parts, body: Field, lx: Field, ly: Field, style, pixel, scale):
    outline, volume = jnp.array(_OUTLINE)[style], jnp.array(_VOLUME)[style]
    # Light from the upper left, the farther below the body's ridge the darker: a cheap look of roundness.
    light = jnp.clip(0.5 - 0.42 * lx - 0.55 * ly, 0, 1) * jnp.clip(-body * 2.2 + 0.45, 0.3, 1)
    shade = 1.0 + volume * (0.75 * light - 0.33)
    ink = jnp.where(style == 3, 0.25, 0.08) * jnp.ones(3)
    thickness = 0.05
    mask = jnp.zeros_like(lx)
    for part in parts:
        alpha = shapes.cover(part.distance * scale, pixel)
        if part.lined:
            edge = shapes.cover((part.distance - thickness) * scale, pixel) * outline
            picture = over(picture, ink, edge)
            mask = jnp.maximum(mask, edge)
        mask = jnp.maximum(mask, alpha)
        painted = jnp.broadcast_to(part.paint, (*lx.shape, 3)) * shade[..., None]
        picture = over(picture, jnp.clip(painted, 0, 1), alpha)
    return picture, mask


def _apply_style(picture: Picture, x: Field, y: Field, scene, style) -> Picture:
    paper = colour(0.98, 0.965, 0.93)
    fade, hatch, mottle = jnp.array(_PAPER)[style], jnp.array(_HATCH)[style], jnp.array(_MOTTLE)[style]
    grey = picture @ jnp.array([0.3, 0.59, 0.11])
    drained = grey[..., None] + (picture - grey[..., None]) * (1 - 0.3 * hatch)
    faded = drained + (paper - drained) * fade
    strokes = 0.5 + 0.5 * jnp.sin(21 * (x + y) + 6 * scene["scenery_5"])
    darkness = jnp.clip(1.0 - grey, 0, 1)
    hatched = faded * (1 - hatch * 0.35 * (strokes * darkness)[..., None])
    blots = jnp.sin(4.3 * x + 5 * scene["scenery_5"] + 1.7 * jnp.sin(3.1 * y)) * jnp.sin(5.1 * y + 1.9 * jnp.sin(3.7 * x))
    washed = hatched + mottle * 0.09 * blots[..., None]
    rim = jnp.clip((jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.86) * 9, 0, 1)
    framed = over(washed, paper, rim * jnp.maximum(mottle, hatch))
    vignette = 1 - jnp.where(style == 0, 0.14, 0.0) * (x * x + y * y)
    return jnp.clip(framed * vignette[..., None], 0, 1)


@partial(jax.jit, static_argnames="size")
@partial(jax.vmap, in_axes=(0, 0, None))
def draw(identity: dict, scene: dict, size: int) -> tuple[Float[Array, "height width 3"], Float[Array, "height width"]]:
    """Picture in [0, 1] and mask in [0, 1] of each (identity, scene) of a batch, `size` pixels square."""
    centres = (jnp.arange(size) + 0.5) * (2.0 / size) - 1.0
    x, y = jnp.meshgrid(centres, centres)
    pixel, style = 2.0 / size, scene["style"].astype(int)
    scenery = jnp.stack([scene[f"scenery_{index}"] for index in range(6)])
    background = paint_background(scene["context"], x, y, scenery, pixel)
    # A photographer's shallow depth of field: scenery a little flat, so that the figure stands out.
    background = jnp.where(style == 0, 0.92 * background + 0.05, background)
    # A draughtsman leaves the scenery faint on the paper.
    background = jnp.where(style == 3, 0.5 * background + 0.47, background)

    scale = scene["scale"]
    lx, ly = shapes.rotate((x - scene["x"]) / scale, (y - scene["y"]) / scale, scene["tilt"])
    shadow = shapes.superellipse(x - scene["x"], y - scene["y"] - scale * 0.92, 0.62 * scale, 0.12 * scale)
    shadow_alpha = shapes.cover(shadow, pixel * 4) * jnp.where(style == 0, 0.45, 0.2)
    background = over(background, colour(0.08, 0.06, 0.12), shadow_alpha)

    drawn, masks = [], []
    for name in CLASSES:
        if name == "creature":
            parts, body = bodies.creature(lx, ly, identity, scene["mood"])
        else:
            parts, body = getattr(bodies, name)(lx, ly, identity)
        picture, mask = _paint_figure(background, parts, body, lx, ly, style=style, pixel=pixel, scale=scale)
        drawn.append(picture)
        masks.append(mask)
    which = scene["class"].astype(int)
    picture, mask = jnp.stack(drawn)[which], jnp.stack(masks)[which]
    return _apply_style(picture, x, y, scene, style), mask


def render(identities: Record, scenes: Record, *, size: int = IMAGE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Renders a record of pictures: uint8 images `[n, size, size, 3]` and uint8 masks `[n, size, size]` (255 inside)."""
    count = len(scenes["style"])
    images = np.empty((count, size, size, 3), np.uint8)
    masks = np.empty((count, size, size), np.uint8)
    for start in range(0, count, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, count))
        # One compiled shape whatever the count: the last chunk is padded with its own first picture.
        chunk = np.concatenate([index, np.full(_CHUNK - len(index), index[0])]) if count > _CHUNK else index
        picture, mask = draw(take(identities, chunk), take(scenes, chunk), size)
        images[index] = np.asarray(jnp.round(picture * 255).astype(jnp.uint8))[: len(index)]
        masks[index] = np.asarray(jnp.round(mask * 255).astype(jnp.uint8))[: len(index)]
    return images, masks
