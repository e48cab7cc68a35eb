"""linear_attention on CPU beside jax-linear-attention's chunked operations: time and memory, in one run.

    python -m experiments.benchmarks.linear_attention_cpu

jax-linear-attention 0.1.0 needs Python 3.12 and pins jax 0.11.2, so the benchmark makes an environment of its
own for both libraries (kept in --env), and runs there. Every contender is first held to the token-by-token
definition in float64; calls are interleaved, so that a busy machine slows all of them alike.
"""

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "benchmarks" / "results"
PEER = "jax-linear-attention==0.1.0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--env", type=Path, default=Path(tempfile.gettempdir()) / "frugax-peer-env", help="kept between runs"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each contender (default 30)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.repeats)
        return
    python = environment(options.env)
    command = [
        python,
        "-m",
        "experiments.benchmarks.linear_attention_cpu",
        "--inside",
        f"--repeats={options.repeats}",
    ]
    sys.exit(subprocess.call(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}))


def environment(path: Path) -> str:
    """The interpreter of a virtual environment with the peer and this repository in it."""
    python = path / "bin" / "python"
    if not python.exists():
        newer = next(
            (p for p in (sys.executable, *map(shutil.which, ("python3.12", "python3.13"))) if p and _new(p)),
            None,
        )
        if newer is None:
            raise SystemExit("no Python >= 3.12 here, which jax-linear-attention needs")
        subprocess.check_call([newer, "-m", "venv", str(path)])
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.check_call([*install, PEER])
    subprocess.check_call([*install, "--no-deps", "-e", str(ROOT)])
    return str(python)


def _new(python: str) -> bool:
    test = "import sys; sys.exit(sys.version_info < (3, 12))"
    return subprocess.call([python, "-c", test], stderr=subprocess.DEVNULL) == 0


def measure(repeats: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jla.ops import chunked

    import frugax

    B, T, H, K = 1, 2048, 4, 64
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(rng.standard_normal((B, T, H, K)), jnp.float32) for _ in range(4))
    gates = {"scalar": (B, T, H), "per_channel": (B, T, H, K)}
    peers = {"scalar": chunked.simple_gla, "per_channel": chunked.gla}
    rows = []
    for kind, shape in gates.items():
        g = jax.nn.log_sigmoid(jnp.asarray(rng.standard_normal(shape), jnp.float32))
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v, g)]
            reference = functools.partial(frugax.kernels.linear_attention, backend="reference")
            want = jax.tree.map(
                np.asarray, gradients(reference)(*wide, jnp.asarray(np.asarray(weights), jnp.float64))
            )
        contenders = {
            "frugax": frugax.kernels.linear_attention,
            "jax_linear_attention": functools.partial(peers[kind], output_final_state=True),
            "token_scan": functools.partial(frugax.kernels.linear_attention, backend="reference"),
        }
        compiled = {name: gradients(f).lower(q, k, v, g, weights).compile() for name, f in contenders.items()}
        errors = {name: worst_error(f(q, k, v, g, weights), want) for name, f in compiled.items()}
        if errors["frugax"] > 1e-5:
            raise SystemExit(
                f"{kind}: frugax is wrong by {errors['frugax']:.1e}: no timing of a wrong answer"
            )
        seconds: dict[str, list[float]] = {name: [] for name in compiled}
        for _ in range(repeats):
            for name, f in compiled.items():
                jax.block_until_ready(f(q, k, v, g, weights))  # what ran before leaves cold caches behind
                start = time.perf_counter()
                jax.block_until_ready(f(q, k, v, g, weights))
                seconds[name].append(time.perf_counter() - start)
        for name, f in compiled.items():
            row = {
                "gate": kind,
                "contender": name,
                "median_ms": round(1e3 * statistics.median(seconds[name]), 2),
                "min_ms": round(1e3 * min(seconds[name]), 2),
                "temporaries_mb": round(f.memory_analysis().temp_size_in_bytes / 1e6, 1),
                "worst_error": float(f"{errors[name]:.2e}"),
                "time_over_frugax": round(
                    statistics.median(
                        t / ours for t, ours in zip(seconds[name], seconds["frugax"], strict=True)
                    ),
                    2,
                ),
            }
            rows.append(row)
            print(json.dumps(row))
    result = {
        "benchmark": "linear_attention forward and gradient on CPU, float32, B=1 T=2048 H=4 K=V=64",
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "model": _cpu()},
        "versions": {p: version(p) for p in ("jax", "jaxlib", "frugax", "jax-linear-attention")},
        "python": platform.python_version(),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "linear_attention_cpu.json").write_text(json.dumps(result, indent=1) + "\n")


def gradients(operation):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(q, k, v, g, weights):
        def loss(q, k, v, g):
            out, state = operation(q, k, v, g)
            return jnp.sum(out * weights) + jnp.sum(jnp.sin(state))

        return jax.value_and_grad(loss, (0, 1, 2, 3))(q, k, v, g)

    return run


def worst_error(actual, expected) -> float:
    import jax
    import numpy as np

    def error(a, e):
        return np.sqrt(np.mean((np.asarray(a, np.float64) - e) ** 2) / np.mean(e**2))

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
