"""The frame of GPU benchmarks: contenders on the same inputs, timed by turns once their numbers agree.

A shape is a frozen dataclass with `arrays()`: the inputs in their dtypes (float32 or bfloat16) and the
output's cotangent, the same at every call. A contender makes a `Runner` of a shape.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .hopper.jobs import read_json, write_json

RESULTS = Path(__file__).parent / "results"
INNER = 10  # calls in a row: a kernel of a tenth of a millisecond is shorter than its dispatch
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-linear-attention",
    "flash-linear-attention",
    "fla-core",
    "mamba-ssm",
    "torch",
    "triton",
)


class Effort(NamedTuple):
    """The extent of a measurement: timings of each contender, and those left out (by text in names)."""

    repeats: int
    without: tuple[str, ...] = ()

    def split(self, contenders: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return the names that take part, and those left out."""
        out = [name for name in contenders if any(text in name for text in self.without)]
        return [name for name in contenders if name not in out], out


class Runner(NamedTuple):
    """One contender with its inputs in place. The first two return before the chip is done."""

    forward: Callable[[], Any]  # the output
    both: Callable[[], Any]  # (the output, the gradient of every input)
    wait: Callable[[Any], Any]  # for the chip, given what a call returned


def jax_runner(f: Callable[..., Any], arrays: Iterable[np.ndarray]) -> Runner:
    """`f` of the inputs has one output."""
    *inputs, cotangent = map(jnp.asarray, arrays)
    forward = jax.jit(f)

    @jax.jit
    def both(cotangent, *inputs):
        out, pullback = jax.vjp(f, *inputs)
        return out, pullback(cotangent)

    return Runner(lambda: forward(*inputs), lambda: both(cotangent, *inputs), jax.block_until_ready)


def torch_runner(f: Callable[..., Any], arrays: Iterable[np.ndarray]) -> Runner:
    """`f` of the inputs, as CUDA tensors, has one output."""
    torch = importlib.import_module("torch")
    *inputs, cotangent = map(torch_tensor, arrays)
    for x in inputs:
        x.requires_grad_()

    def forward():
        with torch.no_grad():
            return f(*inputs)

    def both():
        out = f(*inputs)
        return out, torch.autograd.grad(out, inputs, cotangent)

    return Runner(forward, both, lambda _: torch.cuda.synchronize())


def torch_tensor(x: np.ndarray) -> Any:
    """A CUDA tensor of the same numbers, dtype and strides."""
    torch = importlib.import_module("torch")
    dtype = torch.float32 if x.dtype == np.float32 else torch.bfloat16
    return torch.from_numpy(np.asarray(x, np.float32)).to("cuda", dtype)


def worst_error(result: Any, expected: Any) -> float:
    """The largest rmse / rms over the output and the gradients."""

    def numpy(x):
        return np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float64)

    pairs = [(result[0], expected[0]), *zip(result[1], expected[1], strict=True)]
    wide = [(numpy(a), numpy(e)) for a, e in pairs]
    return max(float(np.sqrt(np.mean((a - e) ** 2) / np.mean(e**2))) for a, e in wide)


def expected(definition: Callable[..., Any], small: Any) -> Any:
    """The definition's output and gradients, in float32, of the inputs as they are rounded."""
    with jax.default_matmul_precision("highest"):
        return jax_runner(definition, [np.asarray(x, np.float32) for x in small.arrays()]).both()


def without_init(name: str) -> Any:
    """The module `name`, its packages' own `__init__` left out: some import what was not built for them.

    Example:
        >>> without_init("json.decoder").JSONDecoder().decode("[1]")
        [1]
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise
    bare = types.ModuleType(package)
    bare.__path__ = list(found.submodule_search_locations)
    sys.modules[package] = bare
    return importlib.import_module(name)


def gate(make: Callable[[Any], Runner], small: Any, wanted: Any) -> float | str:
    """Measure how far a contender's output and gradients are from the right ones; or say why it can't run."""
    try:
        return worst_error(make(small).both(), wanted)
    except Exception as problem:  # not installed, or refuses the call
        return f"{type(problem).__name__}: {problem}"[:200]


def milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """The time of a call, of `INNER` calls in a row; of one where no chip is (a rehearsal)."""
    inner = INNER if jax.default_backend() == "gpu" else 1
    start = time.perf_counter()
    for _ in range(inner):
        out = run()
    wait(out)
    return 1e3 * (time.perf_counter() - start) / inner


def copy_rate() -> float:
    """Bytes a second that a copy of 1 GiB moves, reads and writes: the bandwidth there is to reach."""
    size = 2**30 if jax.default_backend() == "gpu" else 2**20
    x = jnp.zeros(size // 4, jnp.uint32)
    copy = jax.jit(lambda x: x ^ 1)
    jax.block_until_ready(copy(x))
    times = [milliseconds(lambda: copy(x), jax.block_until_ready) for _ in range(10)]
    return 2 * size / (1e-3 * statistics.median(times))


def measure(
    shapes: Iterable[Any],
    contenders: dict[str, Callable[[Any], Runner]],
    definition: Callable[[Any], Callable[..., Any]],
    *,
    stand_in: Callable[[Any], Any],
    bound: float,
    least_bytes: Callable[[Any, str], int],
    effort: Effort,
    beside: dict[str, Callable[[Any], Runner]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape, of the forward pass and of both: median times, their share of a copy.

    Args:
      shapes: what to time.
      contenders: each makes a `Runner` of a shape, or raises.
      definition: the function that a contender must agree with on `stand_in(shape)`, or is not timed.
      stand_in: a shape small enough for the definition, for which contenders choose the same kernels.
      bound: of rmse over rms of the output and every gradient.
      least_bytes: of a shape and "forward" or "both": what must be read and written.
      effort: timings of each, in turns, so that a drifting clock is the same for all; and who is left out.
      beside: what computes something else, of the same size: timed as a yardstick, and not compared.
    """
    beside = beside or {}
    rate = copy_rate()
    taking_part, left_out = effort.split(list(contenders))
    gated: dict[Any, dict[str, float | str]] = {}
    for shape in shapes:
        small = stand_in(shape)
        if small not in gated:
            wanted = expected(definition(small), small)
            gated[small] = {name: gate(contenders[name], small, wanted) for name in taking_part}
            print(f"gate {small}: {gated[small]}", flush=True)
        runners = {}
        makers = contenders | beside
        for name, error in (gated[small] | dict.fromkeys(beside, 0.0)).items():
            if isinstance(error, float) and error <= bound:
                try:
                    runner = makers[name](shape)
                    for run in (runner.forward, runner.both) * 2:
                        runner.wait(run())
                    runners[name] = runner
                except Exception as problem:  # out of memory, or refuses this size
                    print(f"{shape} {name}: {type(problem).__name__}: {problem}"[:300], flush=True)
        for passes in ("forward", "both"):
            times: dict[str, list[float]] = {name: [] for name in runners}
            for _ in range(effort.repeats):
                for name, runner in runners.items():
                    times[name].append(milliseconds(getattr(runner, passes), runner.wait))
            least = 1e3 * least_bytes(shape, passes) / rate
            medians = {name: statistics.median(t) for name, t in times.items()}
            row = dataclasses.asdict(shape) | {
                "passes": passes,
                "median_ms": {name: round(t, 4) for name, t in medians.items()},
                "quartiles_ms": {
                    name: [round(float(x), 4) for x in np.quantile(t, [0.25, 0.75])]
                    for name, t in times.items()
                },
                "share_of_copy": {name: round(least / t, 3) for name, t in medians.items()},
                "copy_gb_a_second": round(rate / 1e9),
                "errors": gated[small],
            }
            if left_out:
                row["left_out"] = left_out
            yield row


def one_each(shapes: Iterable[Any], kind: Callable[[Any], Any]) -> list[Any]:
    """The first shape of each kind."""
    found: dict[Any, Any] = {}
    for shape in shapes:
        found.setdefault(kind(shape), shape)
    return list(found.values())


def compiled(
    shape: Any,
    program: Callable[..., Any],
    arguments: Any,
    *,
    what: str,
    prefix: str,
    kernel_bytes: Any = None,
) -> dict[str, Any]:
    """The row of a shape that no chip has run: what the compiled kernels take, by the name after `prefix`.

    Args:
      shape: for its numbers.
      program, arguments: what to compile; kernels compiled before in this process are left out.
      what: a few words that tell the row's kernels from others.
      prefix: of the kernels' names.
      kernel_bytes: {kernel: what it moves to and from device memory}, if that is known.
    """
    from .deviceless_gpu import kernels_for_h200, table

    def short(name: str) -> str:  # a number of the dump's is at its end
        return name.rstrip("_0123456789").removeprefix(prefix).lstrip("_") or "forward"

    kernels = [
        dataclasses.replace(kernel, name=short(kernel.name))
        for kernel in kernels_for_h200(program, arguments)
    ]
    print(shape, table(kernels), sep="\n", flush=True)
    moved = kernel_bytes or {}
    return dataclasses.asdict(shape) | {
        "what": what,
        "kernels": [
            dataclasses.asdict(k) | ({"bytes": moved[k.name]} if k.name in moved else {}) for k in kernels
        ],
    }


def versions() -> dict[str, str]:
    """The versions of Python and of what takes part."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def why_not() -> str | None:
    """Why this process can't measure; None if it can."""
    if jax.default_backend() != "gpu":
        return f"this needs a Hopper GPU; jax runs on {jax.default_backend()} here (--deviceless needs none)"
    capability = jax.devices()[0].compute_capability
    if float(capability) < 9:
        return f"this needs a Hopper GPU; this one's capability is {capability}"
    return None


def rows_so_far(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `path` that this chip and these versions have measured; none if others have."""
    before = read_json(path)
    if not isinstance(before, dict) or any(before.get(name) != about[name] for name in ("chip", "versions")):
        return []
    return before["rows"]


def is_of(row: dict[str, Any], shape: Any) -> bool:
    """Say if the row is this shape's."""
    fields = json.loads(json.dumps(dataclasses.asdict(shape)))
    return {name: row.get(name) for name in fields} == fields


def kernel_was_timed(row: dict[str, Any]) -> bool:
    """Say if the Mosaic GPU kernel of this library has its time in a row of times."""
    return any("pallas_gpu" in name for name in row["median_ms"])


def with_row(rows: list[dict[str, Any]], new: dict[str, Any], shapes: list[Any]) -> list[dict[str, Any]]:
    """The rows and the new one, in the place of the one of the same shape and passes."""
    same = [
        n
        for n, row in enumerate(rows)
        if row.get("passes") == new.get("passes") and any(is_of(row, s) and is_of(new, s) for s in shapes)
    ]
    return [*rows[: same[0]], new, *rows[same[0] + 1 :]] if same else [*rows, new]


def main(
    doc: str | None,
    name: str,
    shapes: list[Any],
    measure: Callable[[list[Any], Effort], Iterable[dict[str, Any]]],
    deviceless: Callable[[list[Any]], list[dict[str, Any]]],
    tiny: list[Any],
) -> None:
    """The command line of a benchmark; writes results/gpu_NAME_measured.json or gpu_NAME_deviceless.json.

    A measured row is written when it is there.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deviceless", action="store_true", help="compile for H200 and report; run nothing")
    parser.add_argument("--rehearse", action="store_true", help="run on CPU, interpreted, on tiny shapes")
    parser.add_argument("--repeats", type=int, default=30, help="timings of each contender, default 30")
    parser.add_argument("--only", default="", help="only shapes whose text has this in it, as H=96 or 'lstm'")
    parser.add_argument("--without", nargs="+", default=[], help="leave out who has one of these in the name")
    parser.add_argument("--go-on", action="store_true", help="keep the output's rows; measure the others")
    parser.add_argument("--output", type=Path, help="where the JSON goes, default results/")
    options = parser.parse_args()
    kind = "deviceless" if options.deviceless else "rehearsed" if options.rehearse else "measured"
    path = options.output or RESULTS / f"gpu_{name}_{kind}.json"
    chosen = tiny if options.rehearse else [shape for shape in shapes if options.only in str(shape)]
    if not options.deviceless and not options.rehearse and (reason := why_not()):
        sys.exit(reason)
    chip = "H200 (compiled for, not run)" if options.deviceless else jax.devices()[0].device_kind
    about = {"chip": chip, "date": datetime.date.today().isoformat(), "versions": versions()}
    rows = rows_so_far(path, about) if options.go_on else []
    effort = Effort(1 if options.rehearse else options.repeats, tuple(options.without))
    last = [row for row in rows if row.get("passes", "both") == "both"]  # a shape's last row
    done = [row for row in last if effort.without or not row.get("left_out")]
    chosen = [shape for shape in chosen if not any(is_of(row, shape) for row in done)]
    for row in deviceless(chosen) if options.deviceless else measure(chosen, effort):
        rows = with_row(rows, json.loads(json.dumps(row)), chosen)
        write_json(path, about | {"rows": rows})
        if not options.deviceless:
            print(json.dumps(row), flush=True)
    print(f"wrote {path}")
    timed = [] if options.deviceless else [row for row in rows if "median_ms" in row]
    if wrong := [row for row in timed if not kernel_was_timed(row)]:
        sys.exit("\n".join(["our kernel is wrong or failed, and was not timed:", *map(str, wrong)]))
