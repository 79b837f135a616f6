"""Number types of safetensors in NumPy; bfloat16, which it lacks, as the upper halves of float32.

Merging needs no torch: a process that reads, adds and writes is at work before torch would be loaded, and in a part of
its memory.
"""

from __future__ import annotations

import math

import numpy as np

TYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATING = ("F64", "F32", "F16", "BF16")


def wider(dtype: str) -> np.dtype:
    """The type that arithmetic is done in: one wider than what is stored."""
    return np.dtype("f4" if TYPES[dtype].itemsize == 2 else "f8")


def widened(stored: np.ndarray, dtype: str, wide: np.dtype) -> np.ndarray:
    """Numbers as they are stored, in a type to do arithmetic in."""
    if dtype == "BF16":
        bits = stored.astype(np.uint32)
        bits <<= 16
        stored = bits.view(np.float32)
    return stored.astype(wide, copy=False)


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers as they are stored, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(TYPES[dtype], copy=False)
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def sum_of_squares(values: np.ndarray) -> float:
    """In double precision where squares of float32 would not be finite."""
    flat = values.reshape(-1)
    found = float(np.dot(flat, flat))
    return found if math.isfinite(found) else float(np.square(flat, dtype=np.float64).sum())
