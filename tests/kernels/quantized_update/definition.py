"""A step on 8-bit moments in float64 numpy, from tables of values; and what float32 may change of it."""

import numpy as np

from tests.errors import assert_close
from tests.formats.test_formats import table

LOWEST = {"mulaw8": -127, "int8": -127} | dict.fromkeys(
    ("dynamic8", "udynamic8", "udynamic8_positive", "ufp8_e4m4"), 0
)


def step(rule, g, moments, hyper):
    """The rules themselves on float64 moments."""
    if rule == "adam":
        b1, b2, eps, scale1, scale2 = hyper
        m, v = moments
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return m * scale1 / (np.sqrt(v * scale2) + eps), (m, v)
    m = moments[0]
    if rule == "lion":
        b1, b2 = hyper
        return np.sign(b1 * m + (1 - b1) * g), (b2 * m + (1 - b2) * g,)
    new = hyper[0] * m + g
    return (hyper[0] * new + g if rule == "nesterov" else new), (new,)


def groups_of(x, size):
    """[..., C] as a list of its groups along the last axis."""
    return np.split(x, range(size, x.shape[-1], size), axis=-1)


def decode(moment) -> np.ndarray:
    """The float64 values of a QuantizedTensor of 8 bits, whose groups run along the last axis."""
    values = table(moment.format.name)
    codes = np.asarray(moment.codes, int) - LOWEST[moment.format.name]
    scales = np.asarray(moment.scales, np.float64)
    parts = groups_of(values[codes], moment.group_size)
    return np.concatenate([p * scales[..., n, None] for n, p in enumerate(parts)], axis=-1)


def check_stored(moment, exact, name=""):
    """A moment holds the scale and the nearest code of each group of `exact`.

    Float32 rounding moves a number by some 1e-6 of itself: where that crosses the middle between two values,
    either will do.
    """
    values = table(moment.format.name)
    middles = (values[1:] + values[:-1]) / 2
    largest = [np.abs(p).max(-1) for p in groups_of(exact, moment.group_size)]
    scale = np.stack(largest, axis=-1) / values[-1]
    np.testing.assert_allclose(moment.scales, scale, rtol=2e-6, err_msg=name)
    wide = np.repeat(scale, moment.group_size, axis=-1)[..., : exact.shape[-1]]
    unit = exact / np.where(wide == 0, 1, wide)
    slack = 4e-6 * np.abs(unit)
    low, high = (np.searchsorted(middles, unit + s) for s in (-slack, slack))
    codes = np.asarray(moment.codes, int) - LOWEST[moment.format.name]
    assert ((low <= codes) & (codes <= high)).all(), name
    assert (low < high).mean() < 0.01, "the comparison could hardly fail"


def check_step(rule, g, before, after, update, hyper, name=""):
    """`update` and the moments `after` follow from g and the moments `before`."""
    want, exact = step(rule, np.asarray(g, np.float64), [decode(m) for m in before], hyper)
    if rule == "lion":  # a sum that vanishes has either sign
        total = hyper[0] * decode(before[0]) + (1 - hyper[0]) * np.asarray(g, np.float64)
        want = np.where(np.abs(total) < 1e-6 * np.abs(total).max(), np.asarray(update, np.float64), want)
    assert_close(update, want, update.dtype, name=f"{name} update")
    for i, (m, e) in enumerate(zip(after, exact, strict=True)):
        check_stored(m, e, f"{name} moment {i}")


def check_call(arguments, results, name=""):
    """The results of a call are right."""
    update, after = results
    hyper, before = arguments["hyper"], arguments["moments"]
    assert update.dtype == arguments["grad"].dtype
    check_step(arguments["rule"], arguments["grad"], before, after, update, hyper, name)
