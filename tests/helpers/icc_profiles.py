"""Small colour profiles written by hand (ICC.1:2010), and sRGB pictures encoded for them with NumPy alone."""

import struct

import numpy as np

# Primaries as XYZ relative to D50 (rows: red, green, blue), and the curve: a gamma, or None for sRGB's own.
SPACES = {
    "sRGB": ([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]], None),
    "P3": ([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]], None),
    "Adobe RGB": ([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]], 563 / 256),
    "ProPhoto": ([[0.79767, 0.28804, 0.0], [0.13519, 0.71188, 0.0], [0.03134, 0.00009, 0.82491]], 461 / 256),
    "linear": ([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]], 1.0),
}
_WHITE = (0.9642, 1.0, 0.8249)  # D50
_NODES = 9  # a side of the table of the printer's profile


def _fixed(*numbers):
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _xyz(values):
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _curve(gamma):
    if gamma is None:
        return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _profile(kind, space, connection, tags):
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), "wtpt": _xyz(_WHITE), **tags}
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = at + len(body)
    header = struct.pack(">I4xI4s4s4s", size, 0x04200000, kind, space, connection) + struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + _fixed(*_WHITE)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(name):
    primaries, gamma = SPACES[name]
    tags = {f"{letter}XYZ": _xyz(row) for letter, row in zip("rgb", primaries, strict=True)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {**tags, **{f"{letter}TRC": _curve(gamma) for letter in "rgb"}})


def grey_profile(gamma):
    return _profile(b"mntr", b"GRAY", b"XYZ ", {"kTRC": _curve(gamma)})


def to_linear(srgb):
    """sRGB's curve undone (IEC 61966-2-1), of uint8."""
    x = np.asarray(srgb) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded_for(name, srgb):
    """The uint8 numbers that a picture in this space has for the colours of an sRGB picture [h, w, 3]."""
    primaries, gamma = SPACES[name]
    xyz = to_linear(srgb) @ np.array(SPACES["sRGB"][0])
    light = np.clip(xyz @ np.linalg.inv(np.array(primaries)), 0, 1)
    curved = (
        np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) if gamma is None else light ** (1 / gamma)
    )
    return np.round(255 * curved).astype(np.uint8)


def shown_by(name, numbers):
    """The sRGB picture [h, w, 3] that these uint8 numbers of the space show; what is beyond sRGB is cut off."""
    primaries, gamma = SPACES[name]
    light = to_linear(numbers) if gamma is None else (np.asarray(numbers) / 255) ** gamma
    light = np.clip(light @ np.array(primaries) @ np.linalg.inv(np.array(SPACES["sRGB"][0])), 0, 1)
    return np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(np.uint8)


def encoded_grey(gamma, grey):
    """The same for grey pictures: sRGB's grey of a value by another curve."""
    return np.round(255 * to_linear(grey) ** (1 / gamma)).astype(np.uint8)


def inks_of(srgb):
    """CMYK of an ink that takes light away evenly: C = 1 - R, K = 0."""
    return np.concatenate([255 - np.asarray(srgb), np.zeros((*np.shape(srgb)[:2], 1), np.uint8)], axis=-1)


def printer_profile():
    """A printer's profile by a table of CMYK → Lab: the colours of `inks_of`, with two thirds of their light.

    What Pillow makes of CMYK without a profile is far from it.
    """
    steps = np.arange(_NODES) / (_NODES - 1)
    c, m, y, k = np.meshgrid(steps, steps, steps, steps, indexing="ij")
    srgb = np.stack([1 - c, 1 - m, 1 - y], axis=-1) * (1 - k)[..., None]
    xyz = (np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) * 2 / 3) @ np.array(SPACES["sRGB"][0])
    ratio = xyz / np.array(_WHITE)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    numbers = np.round(np.clip(lab * [655.35, 257, 257] + [0, 128 * 257, 128 * 257], 0, 65535)).astype(">u2")
    table = b"mft2\0\0\0\0" + bytes([4, 3, _NODES, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + struct.pack(">HH", 2, 2)
    ends = struct.pack(">HH", 0, 65535)
    # Lab of this kind of table is that of version 2: 100 is 0xFF00.
    numbers = np.round(numbers.astype(float) * 65280 / 65535).astype(">u2")
    return _profile(b"prtr", b"CMYK", b"Lab ", {"A2B0": table + ends * 4 + numbers.tobytes() + ends * 3})
