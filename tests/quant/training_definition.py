"""The block quantizer by look-up in tables of all values, in float64, without the library's code."""

import ml_dtypes
import numpy as np


def table(dtype) -> np.ndarray:
    """Every finite value >= 0 of an 8-bit dtype, or of a 4-bit one."""
    bits = np.arange(16 if "4_" in dtype.__name__ else 256, dtype=np.uint8)
    values = bits.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values) & (values >= 0)])


ELEMENTS = {
    "fp4_e2m1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "fp8_e4m3": table(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": table(ml_dtypes.float8_e5m2),
}
# UE5M3: subnormals m 2^-17, then (1 + m / 8) 2^(e - 15), without the last code, a NaN.
_UE5M3 = [m * 2.0**-17 for m in range(8)]
_UE5M3 += [(1 + m / 8) * 2.0 ** (e - 15) for e in range(1, 32) for m in range(8)][:-1]
SCALES = {
    "e8m0": 2.0 ** np.arange(-126, 128),
    "e4m3": table(ml_dtypes.float8_e4m3fn),
    "ue5m3": np.array(_UE5M3),
}


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The nearest of +-values; x beyond the last saturates. No x is in the middle of two."""
    at = np.clip(np.searchsorted(values, np.abs(x)), 1, len(values) - 1)
    below, above = values[at - 1], values[at]
    return np.where(x < 0, -1, 1) * np.where(np.abs(x) - below < above - np.abs(x), below, above)


def scales_of(amax: np.ndarray, element: str, scale: str, tensor_scale: bool) -> tuple[np.ndarray, float]:
    """Scales of blocks, and of the tensor."""
    largest = ELEMENTS[element][-1]
    outer = 1.0
    if tensor_scale:
        outer = amax.max() / largest / (1.0 if scale == "e8m0" else SCALES[scale][-1])
    if scale == "float32":
        return amax / largest, outer
    if scale == "e8m0":
        return 2.0 ** (np.floor(np.log2(amax / outer)) - np.floor(np.log2(largest))), outer
    return nearest(amax / outer / largest, SCALES[scale]), outer


def round_blocks(x, element: str, scale: str, size: int | None, tensor_scale: bool = False) -> np.ndarray:
    """x [R, K] rounded in blocks of `size` along its rows; None: with one scale."""
    x = np.asarray(x, np.float64)
    rows, n = x.shape
    if size is None:
        s = np.abs(x).max() / ELEMENTS[element][-1]
        return nearest(x / s, ELEMENTS[element]) * s
    blocks = np.pad(x, ((0, 0), (0, -n % size))).reshape(rows, -1, size)
    amax = np.abs(blocks).max(-1, keepdims=True)
    s, outer = scales_of(amax, element, scale, tensor_scale)
    unit = np.where(s > 0, blocks / np.where(s > 0, s * outer, 1), 0)
    return (nearest(unit, ELEMENTS[element]) * s * outer).reshape(rows, -1)[:, :n]
