"""The product in float64 numpy, row by row."""

import jax
import numpy as np

from frugax.formats import QuantizedTensor
from tests.kernels.quantized_matmul.definition import dequantized


def grouped_matmul(lhs, rhs, group_sizes, gather=None, scatter=None, weights=None, out_rows=None):
    """Return y_i = x_i W_e(i), or its weighted sums; complex if an argument is."""
    E = len(group_sizes)
    if isinstance(rhs, QuantizedTensor):
        rhs = np.stack([dequantized(jax.tree.map(lambda a, e=e: a[e], rhs)) for e in range(E)])
    x = lhs if gather is None else lhs[gather]
    y = np.zeros((len(x), rhs.shape[2]), np.result_type(x, rhs))
    for i, e in enumerate(np.repeat(np.arange(E), group_sizes)):
        y[i] = x[i] @ rhs[e]
    if scatter is None:
        return y
    y = y if weights is None else y * weights[:, None]
    total = np.zeros((out_rows, y.shape[1]), y.dtype)
    np.add.at(total, scatter, y)
    return total
