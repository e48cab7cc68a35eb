"""Scans of images in loops over pixels in numpy; they work on complex numbers."""

import numpy as np

from tests.kernels.selective_scan.definition import one_row


def visits(height, width, scan, step):
    """The (row, column) of each token of each path, as the papers draw them; some lie outside."""
    if scan == "cross":
        rows = [(i, j) for i in range(height) for j in range(width)]
        columns = [(i, j) for j in range(width) for i in range(height)]
        return [rows, columns, rows[::-1], columns[::-1]]
    down, across = range(0, height, step), range(0, width, step)
    paths = []
    for column in range(step):
        for row in range(step):
            if len(paths) % 2 == 0:
                paths.append([(i + row, j + column) for i in down for j in across])
            else:
                paths.append([(i + row, j + column) for j in across for i in down])
    return paths


def selective_scan_2d(x, dt, A, B, C, D, *, dt_bias, dt_softplus, scan="cross", step=2):
    """y of an image: a scan of the pixels of each path, one after another."""
    batch, height, width, _ = x.shape
    y = np.zeros(x.shape, np.result_type(x, dt, A, B, C, D, dt_bias))
    for p, path in enumerate(visits(height, width, scan, step)):
        for b in range(batch):
            padded = np.pad(x[b], ((0, 3), (0, 3), (0, 0)))
            tokens = np.stack([padded[i, j] for i, j in path])
            own = dict(dt=dt[p, b], B=B[p, b], C=C[p, b], A=A[p], D=D[p], dt_bias=dt_bias[p])
            out, _ = one_row(tokens, **own, dt_softplus=dt_softplus)
            for t, (i, j) in enumerate(path):
                if i < height and j < width:
                    y[b, i, j] += out[t]
    return y
