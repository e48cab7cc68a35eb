"""The static schedule of TPU kernels, from the compiler alone: cycles, what keeps them busy, and the floor.

    python -m experiments.benchmarks.tpu_schedule linear_attention [--chip v5e ...] [--kernel TEXT]

A kernel is compiled for a chip that is not here, and the compiler's dump says which bundle (one cycle's
instructions) lies in which loop. Bundles times trips is the number of cycles if nothing ever waits: the same
at every run, and a bound that a real chip can't beat. It says nothing of time spent waiting for memory: for
that there is the floor, the larger of (bytes of inputs and outputs, each once) / bandwidth and FLOPs / peak.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from frugax.kernels.common.chips import TPUS

RESULTS = Path(__file__).parent / "results"
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
# GHz. tpu7x's is not published: its floors in cycles, and so its ratios, rest on an assumption.
CLOCK = {chip: TPUS[chip].clock / 1e9 for chip in CHIPS}
NO_TRAFFIC = {"parameter", "custom-call", "bitcast", "tuple", "get-tuple-element", "constant"}
SLOTS = ("matmul", "matpush", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One function to compile: its arguments' shapes, and the FLOPs of the mathematics it does."""

    label: str
    function: Callable[..., Any]
    structs: tuple[Any, ...]
    flops: float
    vector_operations: float = 0  # elementwise ones, in float32, where they may be the bound
    donated: tuple[int, ...] = ()  # arguments whose memory the results take
    launch: str = ""  # how the names of its launches begin; "": as the operation's
    shares: tuple[float, ...] | None = None  # of the grid steps, in which each long branch of the body runs
    packed: int = 0  # bytes of packed weights, if traffic is compared with them


def linear_attention() -> list[Kernel]:
    """B=1, H=8, T=4096, K=V=128, bfloat16; decays float32."""
    import jax
    import jax.numpy as jnp

    from frugax.kernels.linear_attention import pallas_tpu
    from frugax.kernels.linear_attention.inputs import Inputs

    B, T, H, K, V, C = 1, 4096, 8, 128, 128, 128
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    # Multiply-adds a token and head, with chunks of C: q k and its product with v, q S, k v. Backward has
    # each of them twice, and recomputes q k and k v.
    forward = 2 * B * T * H * (C * K + C * V + 2 * K * V)
    backward = 2 * B * T * H * (3 * C * K + 2 * C * V + 5 * K * V)
    decays = {"no decay": None, "scalar": (B, T, H), "per-channel": (B, T, H, K)}
    kernels = []
    for name, shape in decays.items():
        decay = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
        call = Inputs(x, x, x, decay, None, None, None)
        f = partial(pallas_tpu.forward, scale=K**-0.5, interpret=False)
        kernels.append(Kernel(f"forward {name}", f, (call,), forward))
        b = partial(pallas_tpu.backward, scale=K**-0.5, interpret=False)
        kernels.append(Kernel(f"backward {name}", b, (call, (x, state)), backward))
    return kernels


def selective_scan() -> list[Kernel]:
    """B=1, T=4096, D=2048, N=16, bfloat16, softplus, gate fused, states kept; FLOPs are the vector units'."""
    import jax
    import jax.numpy as jnp

    from frugax.kernels.selective_scan import pallas_tpu
    from frugax.kernels.selective_scan.inputs import Inputs

    B, T, D, N = 1, 4096, 2048, 16
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    small, row = jax.ShapeDtypeStruct((B, T, N), jnp.float32), jax.ShapeDtypeStruct((D,), jnp.float32)
    rates = jax.ShapeDtypeStruct((D, N), jnp.float32)
    state = jax.ShapeDtypeStruct((B, D, N), jnp.float32)
    call = Inputs(x, x, rates, small, small, row, x, row, state, None)
    # Operations a token, channel and state; those on channels alone are left out. Forward: dt A, its
    # exponential (which takes a vector slot too), a h, dt x B, their sum, C h and its sum. Backward: the
    # same, and C dy, dh; h dy, its sum; dh dt x, its sum; dh B, its sum; a dh; dlog; dlog A, its sum; dlog
    # dt, its sum.
    forward, backward = (n * B * T * D * N for n in (7, 7 + 14))
    f = partial(pallas_tpu.forward, softplus=True, keep=True, interpret=False)
    b = partial(pallas_tpu.backward, softplus=True, interpret=False)
    arrays = (call, jax.ShapeDtypeStruct((B, T // 128, N, D), jnp.float32), (x, state))
    return [Kernel("forward", f, (call,), 0, forward), Kernel("backward", b, arrays, 0, backward)]


def rnn() -> list[Kernel]:
    """T=512, bfloat16: LSTMs of one head of 1024 channels and of 8 of 128, an sLSTM as the latter."""
    import jax
    import jax.numpy as jnp

    from frugax.kernels.rnn import pallas_tpu
    from frugax.kernels.rnn.cells import CELLS
    from frugax.kernels.rnn.inputs import Inputs

    # Tokens come and go as [T, B, H n D]: so XLA lays out what the products around a layer write and read.
    def split(x, like):
        return jnp.swapaxes(x, 0, 1).reshape(like)

    def join(x):
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 0, 1)

    def forward(shape, gates, *rest):
        h, *others = pallas_tpu.forward(Inputs(split(gates, shape), *rest), keep=True, interpret=False)
        return join(h), *others

    def backward(shape, gates, recurrent, bias, state, h, reads, dh, dstate):
        call = Inputs(split(gates, shape), recurrent, bias, state, None)
        h, dh = (split(x, (*shape[:3], shape[4])) for x in (h, dh))
        gradient = pallas_tpu.backward(call, h, reads, (dh, dstate), interpret=False)
        return gradient._replace(gates=join(gradient.gates))

    kernels = []
    for cell, B, H, D in (
        ("lstm", 16, 1, 1024),
        ("lstm", 16, 8, 128),
        ("slstm", 16, 8, 128),
    ):
        T, G, S, R = 512, CELLS[cell].gates, len(CELLS[cell].states), len(CELLS[cell].reads)

        def array(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype)

        shape, state = (B, T, H, G, D), array(B, S, H, D, dtype=jnp.float32)
        call = (array(T, B, H * G * D), array(H, G, D, D), array(H, G, D), state)
        h, reads = array(T, B, H * D), array(T, H, R, B, D, dtype=jnp.float32)
        label, flops = f"{cell} {B}x{H}x{D}", 2 * B * T * H * G * D * D
        kernels.append(Kernel(f"forward {label}", partial(forward, shape), (*call, None), flops))
        # The kernel's own: R's gradient, a product over all tokens after it, is XLA's.
        b = partial(backward, shape)
        kernels.append(Kernel(f"backward {label}", b, (*call, h, reads, h, state), 2 * flops))
    return kernels


def quantized_update() -> list[Kernel]:
    """Adam on a leaf of 4096 x 4096 with groups of 256, each pair of formats; bound by memory."""
    import jax
    import jax.numpy as jnp

    import frugax

    def step(g, moments, *hyper):
        return frugax.kernels.quantized_update("adam", g, moments, hyper, backend="pallas_tpu")

    hyper = (jax.ShapeDtypeStruct((), jnp.float32),) * 5
    kernels = []
    for names in (("mulaw8", "ufp8_e4m4"), ("dynamic8", "udynamic8")):
        for dtype in (jnp.float32, jnp.bfloat16):
            g = jax.ShapeDtypeStruct((4096, 4096), dtype)
            moments = tuple(
                jax.eval_shape(partial(frugax.formats.quantize, format=f, axis=-1, group_size=256), g)
                for f in names
            )
            kernels.append(
                Kernel(f"{names[0]} {jnp.dtype(dtype).name}", step, (g, moments, *hyper), 0, donated=(0, 1))
            )
    return kernels


def quantized_matmul() -> list[Kernel]:
    """K=N=4096, bfloat16 tokens: format, group size and tokens; W4A8's floor counts int8 products as half."""
    import jax
    import jax.numpy as jnp

    import frugax

    def product(x, w, activations=None):
        return frugax.kernels.quantized_matmul(x, w, activations=activations, backend="pallas_tpu")

    def backward(x, w, dy):
        return jax.vjp(lambda x: product(x, w), x)[1](dy)

    K = N = 4096
    kernels = []
    for format, group, M, activations in (
        *(("int4", 128, 8, None), ("int4", 128, 256, None), ("int4", 32, 8, None), ("int2", 128, 8, None)),
        *(("int3", 128, 8, None), ("int8", 128, 8, None), ("mxfp4", 32, 8, None), ("nvfp4", 16, 8, None)),
        *(("nf4", 64, 8, None), ("fp8_e4m3", 128, 8, None), ("int4", 128, 256, "int8")),
        *(("bitmod4", 128, 8, None), ("bitmod3", 128, 8, None), ("olive4", 128, 8, None)),
    ):
        W = jax.ShapeDtypeStruct((K, N), jnp.float32)
        w = jax.eval_shape(partial(frugax.formats.quantize, format=format, group_size=group), W)
        x, y = (jax.ShapeDtypeStruct((M, size), jnp.bfloat16) for size in (K, N))
        flops = 2 * M * K * N / (1 if activations is None else 2)
        label = f"{format} g{group} M={M}" + (f" {activations}" if activations else "")
        forward = partial(product, activations=activations)
        kernels.append(Kernel(label, forward, (x, w), flops, packed=w.nbytes))
        if M == 256 and activations is None:
            kernels.append(Kernel(f"backward {label}", backward, (x, w, y), flops, packed=w.nbytes))
    return kernels


def grouped_matmul() -> list[Kernel]:
    """M=8192, bfloat16; 8 experts 2048x4096 or 64 of 2048x1024, groups equal or skewed; jax's megablox."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from frugax.kernels.grouped_matmul.pallas_tpu import outer, product
    from frugax.kernels.grouped_matmul.pallas_tpu.tiling import for_outer, for_product
    from frugax.kernels.grouped_matmul.pallas_tpu.visits import visits

    def ours(sizes, M, K, N, phase):
        """The launch for known visits: the schedule of a grid says only then how many steps it has."""
        E, every_group = len(sizes), phase == "drhs"
        k, n = (N, K) if phase == "dlhs" else (K, N)
        t = (for_outer if every_group else for_product)(M, k, n, E, itemsize=2)
        with jax.ensure_compile_time_eval():
            found = visits(jnp.asarray(sizes), M, t.heights, every_group=every_group)
            found = jax.tree.map(np.asarray, found)
        V = int(found.total[0])
        found = found._replace(total=(V,))
        kind, group = found.kind[:V], found.group[:V]
        last = np.append(group[1:] != group[:-1], True)
        when = [kind == i for i in range(len(t.heights))]
        if every_group:
            when = [which for here in when for which in (here & ~last, here & last)]
            f = partial(outer.visited, steps=found, sizes=(E, K, N), t=t, interpret=False)
        else:
            f = partial(product.visited, steps=found, t=t, transposed=phase == "dlhs", interpret=False)
            low, high = found.low[:V], found.high[:V]
            alone = (low == found.start[:V]) & (high % 16 == 0) & when[t.usual(M, E)] & (np.arange(V) < V - 1)
            when = [*(here & ~alone for here in when), alone, ~alone]
            return f, tuple(float(np.mean(which)) for which in when)
        return f, tuple(float(np.mean(which)) for which in (*when, kind == len(t.heights)))

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    kernels = []
    for experts, M, K, N, E, tilings in (
        ("8 experts", 8192, 2048, 4096, 8, ((256, 1024), (512, 1024))),
        ("64 experts", 8192, 2048, 1024, 64, ((64, 1024), (128, 1024))),
    ):
        share = 1 / np.arange(1, E + 1)
        rng = np.random.default_rng(0)
        skewed = rng.multinomial(M, rng.permutation(share / share.sum()))
        for name, sizes in (("equal", np.full(E, M // E)), ("skewed", skewed)):
            sizes = sizes.astype(np.int32)
            for phase in ("forward", "dlhs", "drhs"):
                shapes = {
                    "forward": (array(M, K), array(E, K, N)),
                    "dlhs": (array(M, N), array(E, K, N)),
                    "drhs": (array(M, K), array(M, N)),
                }[phase]
                label, flops = f"{phase} {experts} {name}", 2 * M * K * N
                f, shares = ours(sizes, M, K, N, phase)
                kernels.append(Kernel(label, f, shapes, flops, shares=shares))
                for rows, columns in tilings:
                    depth = {"forward": K, "dlhs": N, "drhs": min(K, 1024)}[phase]
                    wide = columns
                    while rows * depth * wide > 2**29:  # it has the compiler's 16 MiB of fast memory on v5e
                        wide //= 2
                    f, shares = _megablox(sizes, (rows, depth, wide), phase)
                    rival = f"{label} megablox {rows}x{depth}x{wide}"
                    kernels.append(Kernel(rival, f, shapes, flops, launch="megablox", shares=shares))
    return kernels


def _megablox(sizes: Any, tiling: tuple[int, int, int], phase: str) -> tuple[Callable[..., Any], tuple]:
    """jax's megablox for groups that are known, and the shares of its branches."""
    import importlib

    import jax
    import jax.numpy as jnp
    import numpy as np

    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    make = module.make_group_metadata
    rows, groups = sum(sizes), len(sizes)
    with jax.ensure_compile_time_eval():
        known, total = jax.tree.map(
            np.asarray,
            make(
                group_sizes=jnp.asarray(sizes),
                m=rows,
                tm=tiling[0],
                start_group=jnp.int32(0),
                num_nonzero_groups=groups,
                visit_empty_groups=phase == "drhs",
            ),
        )

    def megablox(x, w):
        module.make_group_metadata = lambda **_: (known, int(total))
        try:
            if phase == "drhs":
                return module.tgmm.__wrapped__(x.T, w, jnp.asarray(sizes), jnp.bfloat16, tiling)
            run = partial(module.gmm.__wrapped__, transpose_rhs=phase == "dlhs")
            return run(x, w, jnp.asarray(sizes), jnp.bfloat16, tiling)
        finally:
            module.make_group_metadata = make

    group = known[1][: int(total)]
    first = float(np.mean(np.append(True, group[1:] != group[:-1])))
    return megablox, (first, float(np.mean(sizes[group] > 0)), first) if phase == "drhs" else ()


# name -> what to compile. Another operation adds a function here.
OPERATIONS: dict[str, Callable[[], list[Kernel]]] = {
    "grouped_matmul": grouped_matmul,
    "linear_attention": linear_attention,
    "quantized_matmul": quantized_matmul,
    "quantized_update": quantized_update,
    "rnn": rnn,
    "selective_scan": selective_scan,
}
# Elementwise operations a cycle that a chip's vector units can start: 8 x 128 lanes, four slots a bundle. A
# v5p's two cores share a kernel's grid, and its cycles are one core's.
VECTOR = {"v5e": 4096, "v5p": 8192, "v6e": 4096, "tpu7x": 4096}


def count_bundles(text: str, shares: tuple[float, ...] | None = None) -> list[float]:
    """Count how often each bundle of a `final_bundles` dump runs.

    A loop's trips are in its exit test, which may stand in a loop inside it. The outermost loop is the grid,
    software-pipelined: its first and its last turn skip the largest region that a branch can skip, and only
    move blocks. Regions inside that one (`pl.when`) are taken to run once, as those for the first and the
    last block of a sequence do: a kernel must have no others. With `shares`, as many of them, the longest
    that lie in no other, run in those shares of the steps, in order; what else there is runs in every step.
    """
    loops: list[dict[str, Any]] = []  # depth, trips, names of the next turn's counters: of those open
    within: list[tuple[dict[str, Any], ...]] = []  # the loops around each bundle
    ends, skips = {}, []  # region -> bundle; (bundle, region)
    tests: dict[int, str] = {}  # bundle -> the predicate that skips a region
    bundles: list[tuple[str | None, int, str]] = []
    pattern = r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)(.*)"
    for kind, marks, body in (m.groups() for m in map(partial(re.match, pattern), text.splitlines()) if m):
        empty = body.startswith("{}") and not marks and not kind
        bundles.append((kind, bundles[-1][1] if empty and bundles else marks.count(">"), body))
    for place in range(len(bundles) - 2, -1, -1):  # an outer loop's bundle does not end the inner
        (kind, depth, body), after = bundles[place], bundles[place + 1]
        bundles[place] = kind, depth if after[0] == "LB" else max(depth, after[1]), body
    for place, (kind, depth, body) in enumerate(bundles):
        while loops and loops[-1]["depth"] > depth - (kind == "LB"):
            loops.pop()
        if kind == "LB":
            loops.append({"depth": depth, "trips": 1, "next": re.findall(r"sphi \S+, (%\w+)", body)})
        within.append(tuple(loops))
        for counter, most in re.findall(r"scmp\.ge\S* (?:\(\S+\), )?(%\w+), (\d+) /\* loop exit test", body):
            step = re.search(rf"{counter} = sadd\.s32 (\d+), ", text)
            (loop,) = [x for x in loops if counter in x["next"]] or loops[-1:]
            loop["trips"] = int(most) // int(step[1] if step else 1)
        if depth == 1 and (skip := re.search(r"br\.rel \((!?%\w+)\) target = \$region(\d+)", body)):
            skips.append((place, skip[2]))
            tests[place] = skip[1]
        if kind == "PF":
            ends.update(dict.fromkeys(re.findall(r"region (\d+)", body), place))
    regions = sorted(
        ((ends[name] - first, first, ends[name]) for first, name in skips if ends.get(name, 0) > first)
    )
    main = regions.pop() if regions else None
    if shares is not None and main is not None:
        inside = [region for region in regions if main[1] < region[1] and region[2] <= main[2]]
        inside = [x for x in inside if not any(y[1] < x[1] and x[2] <= y[2] for y in inside)]
        if len(inside) < len(shares):
            raise ValueError(f"shares: got {len(shares)}; expected one for each of {len(inside)} branches")
        longest = sorted(inside[len(inside) - len(shares) :], key=lambda region: region[1])
        # Where all results are copied by the kernel itself, only the first turn skips it.
        skipping = 1 if f"{tests[main[1]]} = scmp.lt" in text else 2
        return [
            _turns(around, skipping if main[1] < place < main[2] else 0)
            * next(
                (n for n, (_, first, end) in zip(shares, longest, strict=True) if first < place < end), 1.0
            )
            for place, around in enumerate(within)
        ]
    times: list[float] = []
    for place, around in enumerate(within):
        count = 1
        for level, loop in enumerate(around):
            if level or main is None or not main[1] < place < main[2]:
                count *= loop["trips"]
            elif not any(first < place < end for _, first, end in regions):
                count *= max(1, loop["trips"] - 2)
        times.append(count)
    return times


def _turns(loops: tuple[dict[str, Any], ...], skipping: int) -> float:
    """Count how often a place within these loops is passed, if so many turns of the outermost one skip it."""
    count = 1
    for level, loop in enumerate(loops):
        count *= max(1, loop["trips"] - skipping) if level == 0 else loop["trips"]
    return count


def read_dump(folder: Path, kernel: str, shares: tuple[float, ...] | None = None) -> dict[str, Any]:
    """Cycles, slots and VMEM of every launch whose name begins with `kernel`."""
    total: dict[str, Any] = {"cycles": 0, "bundles": 0, "vmem": 0, **dict.fromkeys(SLOTS, 0)}
    for path in sorted(folder.glob(f"*-{kernel}*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        prefix = re.match(rf"(\d+-{kernel}.*?)-\d+-final_bundles", path.name)[1]
        times = count_bundles(path.read_text(), shares)
        (use,) = folder.glob(f"{prefix}-*-final_hlo-static-per-bundle-utilization.txt")
        rows = [[int(x) for x in line.split()] for line in use.read_text().splitlines() if line[:1].isdigit()]
        capacity = [int(x) for x in re.search(r"VALU.*\n\s*([\d ]+)\n", use.read_text())[1].split()]
        rows = rows[1:] if rows[0] == capacity else rows
        total["cycles"] += round(sum(times))
        total["bundles"] += len(times)
        for slot, values in zip(SLOTS, zip(*rows, strict=True), strict=True):
            total[slot] += round(sum(n * x for n, x in zip(times, values, strict=False)))
        total["capacity"] = dict(zip(SLOTS, capacity, strict=True))
        (sizes,) = folder.glob(f"{prefix}-*-post-CP.txt")
        vmem = re.findall(r"space=vmem, size = (0x[0-9a-f]+), scoped", sizes.read_text())
        total["vmem"] = max(total["vmem"], sum(int(x, 16) for x in vmem))
    return total


def outside_bytes(hlo: str) -> int:
    """Bytes that XLA's own operations around the kernels read and write.

    Not counted: asynchronous copies and slices (-start, -done), by which XLA fetches operands into VMEM ahead
    of a kernel, beside the one that runs.
    """
    shapes, moved = {}, 0
    for name, result, op, operands in _entry(hlo):
        shapes[name] = _bytes(result)
        if op not in NO_TRAFFIC and not op.endswith(("-start", "-done")):
            moved += shapes[name] + sum(shapes.get(x, 0) for x in operands)
    return moved


def hbm_bytes(hlo: str) -> int:
    """Bytes of HBM that the program reads and writes: its kernels' operands and results, and XLA's around.

    Not counted: what XLA places in fast memory, S(1) in its layouts. A kernel's operand counts once, so that
    the kernel must read no block of it twice; nor is there a loop around one.
    """
    shapes, moved = {}, 0
    for name, result, op, operands in _entry(hlo):
        arrays = re.findall(r"\w+\[[\d,]*\](?:{[^}]*})?", result)
        shapes[name] = sum(_bytes(array) for array in arrays if "S(" not in array)
        if op == "copy-start":  # to fast memory, ahead of a kernel: (copy, original, ...)
            moved += _bytes(arrays[0])
        elif op not in NO_TRAFFIC - {"custom-call"} and not op.endswith("-done"):
            moved += shapes[name] + sum(shapes.get(x, 0) for x in operands)
    return moved


def _entry(hlo: str) -> Iterator[tuple[str, str, str, set[str]]]:
    """Each operation of a program's entry: its name, its result's shape, what it is, and its operands."""
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        match = re.match(r"\s*(?:ROOT )?(%\S+) = (.*?) (\w[\w-]*)\((.*)", line)
        if match:
            name, result, op, operands = match.groups()
            yield name, result, op, set(re.findall(r"%[\w.-]+", operands))


def _bytes(shapes: str) -> int:
    bits = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "s32": 32, "u32": 32, "s8": 8, "u8": 8}
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        size = bits.get(dtype, 0) // 8
        for n in dims.split(","):
            size *= int(n) if n else 1
        total += size
    return total


def measure(operation: str, label: str, chip: str, folder: Path) -> dict[str, Any]:
    """Compile one kernel for one chip, in a process whose dump flags point at `folder`."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    from .deviceless_tpu import compile_for

    (kernel,) = (k for k in OPERATIONS[operation]() if k.label == label)
    compiled = compile_for(chip, kernel.function, *kernel.structs, donate_argnums=kernel.donated)
    version = pltpu.ChipVersion("7x" if chip == "tpu7x" else chip)
    info = pltpu.get_tpu_info_for_chip(version, 1)
    hertz = CLOCK[chip] * 1e9
    found = read_dump(folder, kernel.launch or operation, kernel.shares)

    arrays = [*jax.tree.leaves(kernel.structs), *jax.tree.leaves(compiled.out_info)]
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    memory = moved / info.mem_bw_bytes_per_second * hertz
    matrix = kernel.flops / info.bf16_ops_per_second * hertz
    hlo = compiled.as_text()
    outside = outside_bytes(hlo) / info.mem_bw_bytes_per_second * hertz
    bounds = {"memory": memory, "matrix unit": matrix, "vector unit": kernel.vector_operations / VECTOR[chip]}
    bound, floor = max(bounds.items(), key=lambda item: item[1])
    capacity = found.pop("capacity")
    return {
        "kernel": label,
        "chip": chip,
        "cycles": found["cycles"],
        "copies": round(outside),
        **({"hbm_over_packed": round(hbm_bytes(hlo) / kernel.packed, 3)} if kernel.packed else {}),
        "floor": round(floor),
        "bound": bound,
        "ratio": round((max(found["cycles"], memory) + outside) / floor, 3),
        "schedule_ratio": round(found["cycles"] / floor, 3),
        "matrix_share": round(matrix / max(found["cycles"], 1), 3),
        "busy": {s: round(found[s] / capacity[s] / max(found["cycles"], 1), 3) for s in SLOTS},
        "spills": found["spill"],
        "fills": found["fill"],
        "vmem_bytes": found["vmem"],
        "bytes": moved,
        "flops": kernel.flops,
    }


def in_subprocess(operation: str, label: str, chip: str) -> dict[str, Any]:
    """`measure` where the dump flags are set before JAX is imported."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", __spec__.name, operation, "--measure", label, chip, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"kernel": label, "chip": chip, "error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['kernel']:24} {row['chip']:6} {row['error']}"
    return (
        f"{row['kernel']:24} {row['chip']:6} {row['cycles']:9,} {row['copies']:8,} {row['floor']:9,} "
        f"{row['bound']:11} {row['ratio']:6.2f} {row['matrix_share']:6.2f} {row['busy']['matmul']:6.2f} "
        f"{row['spills']:9,} {row['vmem_bytes'] / 2**20:6.1f}"
    )


def write(operation: str, rows: list[dict[str, Any]]) -> Path:
    """Write the results so far, with what they were measured on."""
    import importlib.metadata

    about = {
        "operation": operation,
        "shapes": OPERATIONS[operation].__doc__,
        "date": datetime.date.today().isoformat(),
        "jax": importlib.metadata.version("jax"),
        "libtpu": importlib.metadata.version("libtpu"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, compiling for chips that are not here",
        "clock_ghz": CLOCK,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tpu_schedule_{operation}.json"
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return path


LEGEND = """\
cycles: bundles x trips. copies: XLA's own operations around the kernel, bytes / bandwidth. floor: inputs and
outputs once over the bandwidth, FLOPs over the peak, or elementwise operations over the vector unit's four a
bundle, whichever is larger. ratio: (cycles, or memory if larger, + copies) / floor. matrix: FLOPs / (cycles x
peak). slots: how busy the matrix unit is, padding included. MiB: of VMEM."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=LEGEND
    )
    parser.add_argument("operation", choices=sorted(OPERATIONS))
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument(
        "--kernel", default="", help="only kernels whose label contains this; nothing is written"
    )
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        label, chip, folder = args.measure
        print(json.dumps(measure(args.operation, label, chip, Path(folder))))
        return

    print(
        f"{'kernel':24} {'chip':6} {'cycles':>9} {'copies':>8} {'floor':>9} {'bound by':11} {'ratio':>6} "
        f"{'matrix':>6} {'slots':>6} {'spills':>9} {'MiB':>6}",
        flush=True,
    )
    rows = []
    whole = not args.kernel and tuple(args.chip) == CHIPS
    for kernel in OPERATIONS[args.operation]():
        for chip in args.chip:
            if args.kernel in kernel.label:
                rows.append(in_subprocess(args.operation, kernel.label, chip))
                print(line(rows[-1]), flush=True)
                if whole:
                    write(args.operation, rows)
    print(LEGEND)


if __name__ == "__main__":
    main()
