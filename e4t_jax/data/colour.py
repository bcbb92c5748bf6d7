"""Colours as sRGB has them, by the profile that a picture brings.

Rendered as the profile's class asks: a printer's perceptually, where it has a table for that, all others relative to white with
black point compensation. A profile that cannot be read, or is of another kind of colours than the picture, is passed over.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

# Colour space of a profile -> Pillow's mode.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_PRINTER = "prtr"
_SIDE = 9  # of the cube of colours by which a profile is found to be sRGB itself


class Profile(NamedTuple):
    """A profile that can be applied."""

    profile: Any  # ImageCms's
    mode: str  # of the pictures that it is for: "RGB", "L", "CMYK" or "LAB"


def open_profile(data: bytes | None) -> Profile | None:
    """The profile in these bytes; None where there is none, it is damaged, or its kind of colours is not known."""
    if not data:
        return None
    try:
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = _MODES.get(profile.profile.xcolor_space.strip())
    except Exception:  # little CMS and Pillow raise many kinds of errors for damaged profiles
        return None
    return None if mode is None else Profile(profile, mode)


def to_srgb(picture: Image.Image, profile: Profile) -> Image.Image:
    """A picture of the profile's mode as RGB with sRGB's colours; as Pillow converts it, where the profile cannot be applied.

    Args:
        picture: Of mode `profile.mode`, 8 bits a channel.
        profile: What its numbers mean.
    """
    plain = picture.convert("RGB") if picture.mode != "LAB" else None
    try:
        transform = _transform(profile)
        if profile.mode in ("RGB", "L") and _changes_nothing(transform, profile.mode):
            return picture.convert("RGB")
        made = ImageCms.applyTransform(picture, transform)
    except ImageCms.PyCMSError:
        made = plain
    assert made is not None  # only in place is nothing returned
    return made


def _transform(profile: Profile) -> ImageCms.ImageCmsTransform:
    perceptual, relative = ImageCms.Intent.PERCEPTUAL, ImageCms.Intent.RELATIVE_COLORIMETRIC
    prints = profile.profile.profile.device_class.strip() == _PRINTER
    asked = prints and profile.profile.profile.is_intent_supported(perceptual, ImageCms.Direction.INPUT)
    return ImageCms.buildTransform(
        profile.profile,
        ImageCms.createProfile("sRGB"),
        profile.mode,
        "RGB",
        renderingIntent=perceptual if asked else relative,
        flags=ImageCms.Flags.NOOPTIMIZE | (0 if asked else ImageCms.Flags.BLACKPOINTCOMPENSATION),
    )


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether no colour of a coarse cube moves by more than rounding: most profiles are sRGB's own."""
    steps = np.linspace(0, 255, _SIDE if mode == "RGB" else 256).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(1, -1, 3) if mode == "RGB" else steps[None]
    cube = Image.fromarray(np.ascontiguousarray(colours))
    made = ImageCms.applyTransform(cube, transform)
    return bool(np.abs(np.asarray(made, int) - np.asarray(cube.convert("RGB"), int)).max() <= 1)
