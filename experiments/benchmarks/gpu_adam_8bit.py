"""The fused 8-bit Adam step on a GPU, as a share of what a copy of as many bytes reaches.

python -m experiments.benchmarks.gpu_adam_8bit        (on a Hopper GPU)
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import frugax

RESULTS = Path(__file__).parent / "results" / "gpu_adam_8bit.json"


def milliseconds(f, *args, inner: int = 20, repeats: int = 9) -> float:
    """The median time of a call, of `inner` calls in a row."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = f(*args)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / inner)
    return float(np.median(times))


def measure(shape: tuple[int, int], group_size: int, dtype) -> dict:
    """Bandwidth of the step and of a copy, in GB/s; raises if the kernel and plain JAX differ."""
    gradient = jax.random.normal(jax.random.key(0), shape, dtype)
    first = frugax.formats.quantize(gradient, "dynamic8", axis=-1, group_size=group_size)
    second = frugax.formats.quantize(gradient**2, "udynamic8", axis=-1, group_size=group_size)
    hyper = (0.9, 0.999, 1e-8, 1.0, 1.0)

    def step(backend):
        return jax.jit(lambda g, m: frugax.kernels.quantized_update("adam", g, m, hyper, backend=backend))

    ours = step("pallas_gpu")
    got, want = (f(gradient, (first, second))[0].astype(jnp.float32) for f in (ours, step("xla")))
    error = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
    if not error < 1e-2:
        raise AssertionError(f"the kernel and plain JAX differ by {error:.1e}; no time is worth reporting")
    moved = 2 * (gradient.nbytes + first.nbytes + second.nbytes)
    copied = jnp.zeros(moved // 2, jnp.uint8)
    copy = jax.jit(lambda x: x ^ jnp.uint8(1))
    rates = {
        "step": moved / milliseconds(ours, gradient, (first, second)) / 1e6,
        "copy": moved / milliseconds(copy, copied) / 1e6,
    }
    return {"GB/s": rates, "share of copy": rates["step"] / rates["copy"], "error": error}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    result: dict = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for group_size in (256, 1024, 2048):
        for dtype in (jnp.float32, jnp.bfloat16):
            name = f"{jnp.dtype(dtype).name}, groups of {group_size}"
            result[name] = measure((16384, 16384), group_size, dtype)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
