"""The product in float64 numpy: codes are read byte by byte, values are the formats' definitions."""

import numpy as np

from frugax.formats import Bipolar, Codebook, CodedScales, Integer, Minifloat, PowerOfTwo
from frugax.kernels import MixedActivations
from tests.formats.test_elements import values_of


def unpacked(w) -> np.ndarray:
    """The codes of w [K, N] as numbers without a sign."""
    packed, bits = np.asarray(w.codes).view(np.uint8).astype(int), w.format.bits
    if bits == 8:
        return packed
    n = packed.shape[0] * 8 // bits
    block = np.gcd(n, 256)
    codes = np.zeros((n, packed.shape[1]), int)
    for k in range(n):
        byte, low = k // block * block * bits // 8, 0
        for width in (4, 2, 1):
            if bits & width:
                rows = block * width // 8
                place, inside = divmod(k % block, rows)
                codes[k] += ((packed[byte + inside] >> place * width) % 2**width) << low
                byte, low = byte + rows, low + width
    return codes[: n - w.padding]


def values(element, codes: np.ndarray) -> np.ndarray:
    """The values of codes without a sign."""
    if isinstance(element, Minifloat):
        return values_of(element)[codes]
    if isinstance(element, Codebook):
        return np.array(element.values)[codes]
    if isinstance(element, Bipolar):
        return sum(2.0**i * (2 * (codes >> i & 1) - 1) for i in range(element.bits))
    assert isinstance(element, Integer)
    return np.where(element.signed & (codes >= 2 ** (element.bits - 1)), codes - 2.0**element.bits, codes)


def scales_of(w) -> np.ndarray:
    """The scale of each group [G, N], or one for all."""
    if isinstance(w.scales, CodedScales):  # NVFP4's: a product in float32
        value = values_of(w.scales.element)[np.asarray(w.scales.codes)].astype(np.float32)
        return (value * np.asarray(w.scales.outer)).astype(float)
    if isinstance(w.format.scheme, PowerOfTwo):
        return 2.0 ** (np.asarray(w.scales, float) - 127)
    return np.asarray(w.scales, float)


def dequantized(w) -> np.ndarray:
    """W [K, N]."""
    x = values(w.format.element, unpacked(w))
    of_row = np.arange(x.shape[0]) // w.group_size
    scales, zeros = scales_of(w), 0.0 if w.zeros is None else np.asarray(w.zeros, float)[of_row]
    return (x - zeros) * (scales[of_row] if scales.shape[0] > 1 else scales)


def rounded(x: np.ndarray, largest: float, highest: int) -> np.ndarray:
    """Tokens [..., K] in integers: a scale brings the largest number of each to `largest`."""
    scale = np.abs(x).max(-1, keepdims=True) / largest
    return np.clip(np.rint(x / scale), -highest, highest) * scale


def activated(x: np.ndarray, activations) -> np.ndarray:
    """Tokens as they are multiplied."""
    if activations is None:
        return x
    if activations == "int8":
        return rounded(x, 127, 127)
    assert isinstance(activations, MixedActivations)
    blocks = np.split(x, range(activations.block, x.shape[-1], activations.block), -1)
    of_block = [(127, 127) if i < activations.high_blocks else (7.5, 7) for i in range(len(blocks))]
    return np.concatenate([rounded(b, *how) for b, how in zip(blocks, of_block, strict=True)], -1)


def quantized_matmul(x, w, bias=0.0, activations=None, method=None):
    """Return x W + b, complex if x or b is and activations are not rounded."""
    return activated(x, activations) @ dequantized(w) + bias
