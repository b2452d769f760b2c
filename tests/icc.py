"""Builds ICC profiles from the specification (ICC.1:2001-04), for comparing color conversion with computed colors."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
ADOBE_GAMMA = 563 / 256
# Adobe RGB (1998) adapted to D50, columns red, green, blue: annex C of its specification
ADOBE_TO_XYZ = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
# sRGB adapted to D50 by Bradford, as in the sRGB profile of the ICC
SRGB_TO_XYZ = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(kind: bytes, color_space: bytes, connection_space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Build a version 2 profile for a device class, its color space and the connection space."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"cprt": b"text\0\0\0\0none\0"} | tags
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, kind, color_space, connection_space)
    head += bytes(12) + b"acsp" + bytes(28) + fixed(*D50)
    return head + bytes(128 - len(head)) + table + body


def adobe_rgb() -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563)
    tags = {}
    for name, column in zip((b"r", b"g", b"b"), ADOBE_TO_XYZ.T, strict=True):
        tags |= {name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*column), name + b"TRC": curve}
    return profile(b"mntr", b"RGB ", b"XYZ ", tags)


def adobe_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Convert Adobe RGB (..., 3) in 0..255 to sRGB in 0..255 with the matrices."""
    linear = (pixels / 255) ** ADOBE_GAMMA @ ADOBE_TO_XYZ.T @ np.linalg.inv(SRGB_TO_XYZ).T
    return 255 * srgb_curve(linear)


def gray_gamma(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def srgb_curve(linear: np.ndarray) -> np.ndarray:
    """Convert linear light to sRGB (IEC 61966-2-1), both in 0..1."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def cmyk(corners: dict[tuple[int, ...], tuple[float, float, float]]) -> bytes:
    """Build a printer profile with the L*a*b* of the 16 combinations of full inks: a lut8 with two points per ink."""
    grid = b""
    for index in range(16):
        light, a, b = corners[tuple(index >> shift & 1 for shift in (3, 2, 1, 0))]
        grid += bytes([round(light * 2.55), round(a + 128), round(b + 128)])
    identity = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": head + identity * 4 + grid + identity * 3})


def lab_to_srgb(light: float, a: float, b: float) -> np.ndarray:
    """Convert CIE L*a*b* under D50 to sRGB in 0..255."""
    y = (light + 16) / 116
    ratios = np.array([y + a / 500, y, y - b / 200])
    ratios = np.where(ratios > 6 / 29, ratios**3, (ratios - 4 / 29) * 3 * (6 / 29) ** 2)
    return 255 * srgb_curve(np.linalg.inv(SRGB_TO_XYZ) @ (ratios * D50))
