"""Memory of a gradient under each policy of rematerialization, on the host and in tiles: nothing is run.

  python -m experiments.benchmarks.memory v5e        five minutes on a core; writes its part of the JSON
  python -m experiments.benchmarks.memory h200 full  one row alone

A decoder of gated linear attention, compiled by each chip's own compiler. Temporaries are what the program
needs beside its arguments and results, by XLA's own account: activations, and gradients on their way.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import frugax
from experiments.benchmarks import deviceless_gpu, deviceless_tpu
from experiments.benchmarks.interleaved import about
from experiments.trainer.state import token_losses

RESULTS = Path(__file__).parent / "results" / "memory.json"
WIDTH, DEPTH, VOCABULARY, TIME = 1024, 16, 32_768, 8192
FULL = {"remat": "full", "offload": True}
WAYS: dict[str, tuple[dict[str, Any], int]] = {  # fields of the decoder, and tiles of the loss
    "none": ({}, 1),
    "dots": ({"remat": "dots"}, 1),
    "dots_without_batch": ({"remat": "dots_without_batch"}, 1),
    "dots_without_batch, offload": ({"remat": "dots_without_batch", "offload": True}, 1),
    "full": ({"remat": "full"}, 1),
    "full, offload": (FULL, 1),
    "full, offload, loss_tiles=8": (FULL, 8),
    "full, offload, loss_tiles=8, mlp_tiles=8": (FULL | {"mlp_tiles": 8}, 8),
}


def compiled(chip: str, fields: dict[str, Any], loss_tiles: int) -> jax.stages.Compiled:
    """Compile the gradient of the decoder's loss on one row of tokens for a chip."""
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 4})
    module = frugax.layers.Decoder(VOCABULARY, WIDTH, (block,), DEPTH, dtype=jnp.bfloat16, **fields)
    row = jax.ShapeDtypeStruct((1, TIME), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), row)
    params = jax.eval_shape(module.init, jax.random.key(0), row)["params"]

    def loss(params, batch):
        losses, _ = token_losses(module, {"params": params}, batch, tiles=loss_tiles, mutable=["moe"])
        return losses.mean()

    compile_for = {"h200": deviceless_gpu.compile_for_h200}.get(
        chip, lambda *args: deviceless_tpu.compile_for(chip, *args)
    )
    return compile_for(jax.grad(loss), params, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chip", choices=("v5e", "v5p", "v6e", "h200"))
    parser.add_argument("ways", nargs="*", help=f"rows to make again; by default all: {'; '.join(WAYS)}")
    args = parser.parse_args()
    chip = args.chip
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    model = f"{DEPTH} blocks of gated linear attention, {WIDTH} wide, {VOCABULARY:,} tokens known, "
    result = about() | {"model": f"{model}1 x {TIME} tokens, bfloat16"}
    for name in args.ways or WAYS:
        fields, tiles = WAYS[name]
        memory = compiled(chip, fields, tiles).memory_analysis()
        on_device, on_host = memory.temp_size_in_bytes, memory.host_temp_size_in_bytes
        rows.setdefault(name, {})[chip] = {"temporaries": on_device, "host": on_host}
        RESULTS.write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n")
        print(name, rows[name][chip], flush=True)


if __name__ == "__main__":
    main()
