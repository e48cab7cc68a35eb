"""Products of numbers of any bits as products of their bit planes, every one of which is -1 or 1.

A bipolar number is sum_i 2^i s_i with signs s_i. So x w = sum_{i,j} 2^(i+j) (s_i of x) (s_j of w), and a
product of sign vectors of length n is n - 2 popcount(x_i xor w_j).

Source: Ma et al. 2024, Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor
Cores (arXiv 2409.17870); six bits of both are FlexQ's point (2508.04405).
"""

import jax.numpy as jnp
from jax import Array, lax

from ...formats import Format
from .activations import each_segment, quantize_activations
from .decode import groups
from .inputs import Inputs, Spec, weights

WORD = 32  # signs


def product(call: Inputs, spec: Spec) -> Array:
    """x W [M, N]: int32 sums of each segment of rows, scaled."""
    x, format = quantize_activations(call.x, spec), spec.activations
    assert isinstance(format, Format)
    assert x.scales is not None
    codes = ((x.values + format.element.largest) / 2).astype(jnp.int32)
    segment = min(spec.group_size, x.block)
    sums = plane_products(codes, weights(call, spec).unpacked(), format.bits, spec.format.bits, segment)
    n = sums.shape[0]
    of_tokens = each_segment(x.scales.T, x.block, segment, n)
    scales = each_segment(groups(call, spec).scales, spec.group_size, segment, n).astype(of_tokens.dtype)
    return jnp.sum(sums.astype(of_tokens.dtype) * of_tokens[:, :, None] * scales[:, None], 0)


def plane_products(x: Array, w: Array, x_bits: int, w_bits: int, segment: int) -> Array:
    """Sum products of bipolar numbers, by bits alone.

    Args:
      x: codes [M, K].
      w: codes [N, K].
      x_bits, w_bits: of each code.
      segment: products that are summed together; the last segment may have fewer.

    Returns:
      int32 [segments, M, N].
    """
    K = x.shape[1]
    lengths = jnp.minimum(segment, K - jnp.arange(0, K, segment, dtype=jnp.int32))
    x_planes, w_planes = _words(x, x_bits, segment), _words(w, w_bits, segment)

    def add(ij, total):
        i, j = ij // w_bits, ij % w_bits
        differ = lax.population_count(x_planes[i][:, :, None] ^ w_planes[j][:, None])  # [n, M, N, words]
        signs = lengths[:, None, None] - 2 * jnp.sum(differ.astype(jnp.int32), -1, dtype=jnp.int32)
        return total + (signs << (i + j))

    zeros = jnp.zeros((lengths.shape[0], x.shape[0], w.shape[0]), jnp.int32)
    return lax.fori_loop(0, x_bits * w_bits, add, zeros)


def _words(codes: Array, bits: int, segment: int) -> Array:
    """Each bit of codes [rows, K] packed along K: uint32 [bits, segments, rows, words]; zeros fill up."""
    rows, K = codes.shape
    n = -(-K // segment)
    codes = jnp.pad(codes, ((0, 0), (0, n * segment - K))).reshape(rows, n, segment)
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, -segment % WORD))).reshape(rows, n, -1, WORD)
    places = jnp.arange(WORD, dtype=jnp.uint32)[None, None, None, None]
    plane = (codes[None] >> jnp.arange(bits, dtype=jnp.int32)[:, None, None, None, None]) & 1
    words = jnp.sum(plane.astype(jnp.uint32) << places, -1, dtype=jnp.uint32)
    return jnp.swapaxes(words, 1, 2)
