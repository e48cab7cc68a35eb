"""The calls that each Mosaic GPU kernel has to get right on the chip: one row of `CASES` an operation.

Each row is a process. Its calls: a plain one; one of a ragged length with documents and a state; and, where a
kernel chooses another way by size, one of that size. A rehearsal has the second alone, tiny.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import frugax

BF16, F32 = np.dtype(jnp.bfloat16), np.dtype(np.float32)
ADAM = (0.9, 0.999, 1e-8, 1 / (1 - 0.9**3), 1 / (1 - 0.999**3))


class Case(NamedTuple):
    """One call. Its floats are differentiated, but for those of an operation that has no gradient."""

    what: str
    call: Callable[..., Any]  # of `backend` and the arrays, by name
    arrays: dict[str, Any]
    times: float = 1.0  # this many times the error that the results' dtype explains is right
    gradients: bool = True


class Draw:
    """Random arrays, the same at every run."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = BF16, times: float = 1.0) -> np.ndarray:
        """Draw normal numbers."""
        return (times * self.rng.standard_normal(shape)).astype(dtype)

    def spread(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Draw float32 between `low` and `high`, evenly on a log scale."""
        return np.exp(self.rng.uniform(np.log(low), np.log(high), shape)).astype(F32)

    def documents(self, batch: int, tokens: int) -> np.ndarray:
        """Draw ids of some four documents, of which one may come back."""
        starts = self.rng.random((batch, tokens)) < 4 / tokens
        starts[:, tokens // 2] = True
        return np.cumsum(starts, axis=1).astype(np.int32) % 3


def linear_attention(tiny: bool, decay: str | None, bonus: bool = False) -> Iterator[Case]:
    """Yield calls with the decay of that shape. With 64 heads or more, forward passes may be fused."""
    shapes = [(2, 256, 2, 64, 64, False), (2, 300, 4, 128, 128, True), (1, 100, 128, 128, 64, True)]
    for B, T, H, K, V, state in [(1, 70, 1, 64, 64, True)] if tiny else shapes:
        draw = Draw(T)
        arrays = {"q": draw.normal(B, T, H, K), "k": draw.normal(B, T, H, K), "v": draw.normal(B, T, H, V)}
        if decay is not None:
            sizes = {"b": B, "t": T, "h": H, "k": K}
            arrays["log_decay"] = -draw.spread(0.01, 1.0, *(sizes[axis] for axis in decay))
        if bonus:
            arrays["bonus"] = draw.normal(H, K, dtype=F32)
        if state:
            arrays["initial_state"] = draw.normal(B, H, K, V, dtype=F32)
            arrays["segment_ids"] = draw.documents(B, T)
        yield Case(f"B={B} T={T} H={H} K={K} V={V} state={state}", frugax.kernels.linear_attention, arrays)


def taylor_attention(tiny: bool) -> Iterator[Case]:
    """Yield Based's calls: features of 16 channels or fewer, and a column of ones beside 64 channels of v."""
    call = partial(frugax.kernels.linear_attention, feature_map="taylor")
    shapes = [(2, 256, 2, 16, 64, False), (2, 300, 4, 16, 65, True), (1, 100, 128, 8, 24, True)]
    for B, T, H, K, V, state in [(1, 70, 1, 5, 24, True)] if tiny else shapes:
        draw = Draw(T)
        arrays = {"q": draw.normal(B, T, H, K), "k": draw.normal(B, T, H, K), "v": draw.normal(B, T, H, V)}
        if state:
            features = 1 + K + K * (K + 1) // 2
            arrays["initial_state"] = draw.normal(B, H, features, V, dtype=F32)
            arrays["segment_ids"] = draw.documents(B, T)
        yield Case(f"B={B} T={T} H={H} K={K} V={V} state={state}", call, arrays)


def ssd(tiny: bool) -> Iterator[Case]:
    """Yield Mamba-2's calls: groups of heads, its step sizes, skip and gate."""
    call = partial(frugax.kernels.ssd, dt_softplus=True)
    for B, T, H, P, N, state in (
        [(1, 70, 2, 32, 64, True)]
        if tiny
        else [
            (2, 256, 4, 64, 128, False),
            (2, 300, 4, 64, 64, True),
        ]
    ):
        draw = Draw(T)
        arrays = {
            "x": draw.normal(B, T, H, P),
            "dt": draw.normal(B, T, H) - BF16.type(2),
            "A": -draw.spread(0.1, 2.0, H),
            "B": draw.normal(B, T, 1, N),
            "C": draw.normal(B, T, 1, N),
            "D": draw.normal(H, dtype=F32),
            "z": draw.normal(B, T, H, P),
        }
        if state:
            arrays["initial_state"] = draw.normal(B, H, N, P, dtype=F32)
            arrays["segment_ids"] = draw.documents(B, T)
        yield Case(f"B={B} T={T} H={H} P={P} N={N} state={state}", call, arrays, times=6)


def selective_scan(tiny: bool, dtype: np.dtype) -> Iterator[Case]:
    """Yield Mamba's calls: whole ones, and the recurrence alone."""
    for B, T, D, N, whole in (
        [(1, 20, 24, 4, True)]
        if tiny
        else [
            (2, 256, 256, 16, False),
            (2, 300, 200, 16, True),
            (1, 1000, 128, 8, True),
        ]
    ):
        draw = Draw(T)
        dt = draw.normal(B, T, D, dtype=F32, times=0.5) - 1
        arrays = {
            "x": draw.normal(B, T, D, dtype=dtype),
            "dt": (dt if whole else np.exp(dt)).astype(dtype),
            "A": -draw.spread(0.1, 10.0, D, N),
            "B": draw.normal(B, T, N, dtype=dtype),
            "C": draw.normal(B, T, N, dtype=dtype),
        }
        if whole:
            arrays |= {"D": draw.normal(D, dtype=F32), "z": draw.normal(B, T, D, dtype=dtype)}
            arrays |= {"dt_bias": draw.normal(D, dtype=F32)}
            arrays |= {"initial_state": draw.normal(B, D, N, dtype=F32), "segment_ids": draw.documents(B, T)}
        call = partial(frugax.kernels.selective_scan, dt_softplus=whole)
        yield Case(f"B={B} T={T} D={D} N={N} whole={whole}", call, arrays)


def linear_recurrence(tiny: bool, dtype: np.dtype) -> Iterator[Case]:
    """Yield calls in both directions."""
    for B, T, D, reverse, state in (
        [(1, 40, 24, True, True)]
        if tiny
        else [
            (2, 256, 256, False, False),
            (2, 300, 200, True, True),
            (3, 1000, 70, False, True),
        ]
    ):
        draw = Draw(T)
        arrays = {"a": np.exp(-draw.spread(0.01, 2.0, B, T, D)).astype(dtype)}
        arrays["b"] = draw.normal(B, T, D, dtype=dtype)
        if state:
            arrays |= {"initial_state": draw.normal(B, D, dtype=F32), "segment_ids": draw.documents(B, T)}
        call = partial(frugax.kernels.linear_recurrence, reverse=reverse)
        yield Case(f"B={B} T={T} D={D} reverse={reverse} state={state}", call, arrays)


def causal_conv1d(tiny: bool, dtype: np.dtype) -> Iterator[Case]:
    """Yield calls with filters of two to four taps."""
    for B, T, D, W, state in (
        [(1, 40, 24, 4, True)]
        if tiny
        else [
            (2, 256, 256, 4, False),
            (2, 300, 200, 4, True),
            (3, 1000, 72, 2, True),
        ]
    ):
        draw = Draw(T)
        arrays = {"x": draw.normal(B, T, D, dtype=dtype), "weight": draw.normal(W, D, dtype=dtype)}
        if state:
            arrays["bias"] = draw.normal(D, dtype=dtype)
            arrays["initial_state"] = draw.normal(B, W - 1, D, dtype=dtype)
            arrays["segment_ids"] = draw.documents(B, T)
        call = partial(frugax.kernels.causal_conv1d, activation="silu" if state else None)
        yield Case(f"B={B} T={T} D={D} W={W} state={state}", call, arrays)


def rnn(tiny: bool, cell: str, gates: int, states: int) -> Iterator[Case]:
    """Yield calls of a cell: batches that fill a tile and ones that don't."""
    for B, T, H, D, state in (
        [(2, 9, 1, 64, True)]
        if tiny
        else [
            (16, 64, 2, 128, False),
            (5, 70, 3, 64, True),
            (1, 33, 1, 48, True),
        ]
    ):
        draw = Draw(T)
        arrays = {
            "gates": draw.normal(B, T, H, gates, D),
            "recurrent": draw.normal(H, gates, D, D, times=0.7 / D**0.5),
            "bias": draw.normal(H, gates, D),
        }
        if state:
            first = draw.normal(B, states, H, D, dtype=F32)
            if cell == "slstm":
                first[:, 2] = 1 + np.abs(first[:, 2])  # n, which divides
            arrays |= {"initial_state": first, "segment_ids": draw.documents(B, T)}
        yield Case(
            f"B={B} T={T} H={H} D={D} state={state}", partial(frugax.kernels.rnn, cell=cell), arrays, 2
        )


def quantized_update(
    tiny: bool, rule: str, formats: tuple[str, ...], hyper: tuple[float, ...]
) -> Iterator[Case]:
    """Yield steps, whose results are the update and the moments as numbers."""

    def call(grad, moments, backend):
        update, new = frugax.kernels.quantized_update(rule, grad, moments, hyper, backend=backend)
        return update, *(m.dequantize() for m in new)

    for shape, group_size, dtype in (
        [((3, 256), 128, F32)]
        if tiny
        else [
            ((300, 1024), 256, F32),
            ((67, 512), 128, BF16),
            ((5, 3, 4096), 2048, BF16),
        ]
    ):
        draw = Draw(group_size)
        rows = draw.spread(1e-4, 1.0, *shape[:-1], 1)
        before = [(rows * draw.normal(*shape, dtype=F32)) ** (n + 1) for n in range(len(formats))]
        moments = tuple(
            frugax.formats.quantize(jnp.asarray(x), name, axis=-1, group_size=group_size)
            for x, name in zip(before, formats, strict=True)
        )
        grad = (rows * draw.normal(*shape, dtype=F32)).astype(dtype)
        # Between two codes' values either may be taken: rarely, but by more than float32's rounding.
        times = 1.0 if dtype == BF16 else 500.0
        arrays = {"grad": grad, "moments": moments}
        yield Case(f"{shape} groups of {group_size} {dtype}", call, arrays, times, gradients=False)


def quantized_matmul(tiny: bool, formats: tuple[str, ...], activations: str | None = None) -> Iterator[Case]:
    """Yield products with weights in few bits, and the gradients of tokens and bias."""
    for name in formats[:1] if tiny else formats:
        groups = {"int8": None, "ternary": None, "mxfp4": None, "nvfp4": None}
        for M, K, N, dtype in (
            [(3, 256, 128, BF16)]
            if tiny
            else [
                (1, 1024, 256, BF16),
                (16, 4096, 512, BF16),
                (130, 768, 384, np.dtype(np.float16)),
                (300, 2048, 512, BF16),
            ]
        ):
            draw = Draw(M)
            w = frugax.formats.quantize(
                jnp.asarray(draw.normal(K, N, dtype=F32)), name, group_size=groups.get(name, 128)
            )

            def call(x, bias, backend, w=w):
                return frugax.kernels.quantized_matmul(
                    x, w, bias=bias, activations=activations, backend=backend
                )

            arrays = {"x": draw.normal(M, K, dtype=dtype), "bias": draw.normal(N, dtype=dtype)}
            yield Case(f"{name} M={M} K={K} N={N} {dtype}", call, arrays)


def grouped_matmul(tiny: bool, dtype: np.dtype) -> Iterator[Case]:
    """Yield products of rows with their experts; an expert may have no rows, and a row no expert."""
    for M, K, N, sizes, placed in (
        [(24, 64, 64, (9, 0, 5), False)]
        if tiny
        else [
            (1000, 256, 512, (333, 0, 1, 129, 537), False),
            (4096, 512, 1024, (4000, 7, 64, 5), True),
            (70, 128, 192, (3,) * 20 + (0,) * 12, True),
        ]
    ):
        draw = Draw(M)
        arrays = {"lhs": draw.normal(M, K, dtype=dtype), "rhs": draw.normal(len(sizes), K, N, dtype=dtype)}
        arrays["group_sizes"] = np.array(sizes, np.int32)
        call: Callable[..., Any] = frugax.kernels.grouped_matmul
        if placed:  # rows of tokens that go to two experts each, and come back
            arrays["lhs"] = arrays["lhs"][: M // 2]
            arrays["weights"] = draw.normal(M, dtype=F32)
            arrays["gather"] = draw.rng.permutation(M).astype(np.int32) // 2
            arrays["scatter"] = arrays["gather"]
            call = partial(call, out_rows=M // 2)
        what = f"M={M} K={K} N={N} E={len(sizes)} gather and scatter={placed}"
        yield Case(what, call, arrays, times=2 if placed else 1)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "linear_attention, a decay a head and token": partial(linear_attention, decay="bth"),
    "linear_attention, a decay a channel": partial(linear_attention, decay="bthk"),
    "ssd": ssd,
    "selective_scan, bfloat16": partial(selective_scan, dtype=BF16),
    "rnn, lstm": partial(rnn, cell="lstm", gates=4, states=2),
    "quantized_matmul, four bits": partial(
        quantized_matmul, formats=("int4", "uint4", "nf4", "nf4_dq", "mxfp4", "nvfp4")
    ),
    "quantized_matmul, other widths": partial(
        quantized_matmul, formats=("int3", "int8", "ternary", "uint5", "bipolar6", "fp6_e3m2", "mxfp8")
    ),
    "quantized_matmul, int8 tokens": partial(
        quantized_matmul, formats=("int8", "int4", "ternary"), activations="int8"
    ),
    "quantized_matmul, fp8 tokens": partial(quantized_matmul, formats=("fp8_e4m3",), activations="fp8_e4m3"),
    "grouped_matmul, bfloat16": partial(grouped_matmul, dtype=BF16),
    "quantized_update, adam": partial(
        quantized_update, rule="adam", formats=("dynamic8", "udynamic8"), hyper=ADAM
    ),
    "causal_conv1d, bfloat16": partial(causal_conv1d, dtype=BF16),
    "linear_recurrence, bfloat16": partial(linear_recurrence, dtype=BF16),
    "linear_attention, Taylor features": taylor_attention,
    "linear_attention, no decay": partial(linear_attention, decay=None),
    "linear_attention, a decay a head": partial(linear_attention, decay="h"),
    "linear_attention, a decay a channel and a bonus": partial(linear_attention, decay="bthk", bonus=True),
    "linear_attention, a decay a head and token and a bonus": partial(
        linear_attention, decay="bth", bonus=True
    ),
    "selective_scan, float32": partial(selective_scan, dtype=F32),
    "linear_recurrence, float32": partial(linear_recurrence, dtype=F32),
    "causal_conv1d, float32": partial(causal_conv1d, dtype=F32),
    "rnn, gru": partial(rnn, cell="gru", gates=3, states=1),
    "rnn, elman": partial(rnn, cell="elman", gates=1, states=1),
    "rnn, slstm": partial(rnn, cell="slstm", gates=4, states=4),
    "grouped_matmul, float16": partial(grouped_matmul, dtype=np.dtype(np.float16)),
    "quantized_update, adam in ufp8": partial(
        quantized_update, rule="adam", formats=("mulaw8", "ufp8_e4m4"), hyper=ADAM
    ),
    "quantized_update, lion": partial(
        quantized_update, rule="lion", formats=("dynamic8",), hyper=(0.9, 0.99)
    ),
    "quantized_update, momentum": partial(quantized_update, rule="momentum", formats=("int8",), hyper=(0.9,)),
}
