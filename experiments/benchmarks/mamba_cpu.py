"""A training step of a small Mamba against the same model in `transformers` on CPU, in one interleaved run.

Both have the same weights: torch's are saved, and loaded here. A step is the loss of predicting the next
token and the gradient of every weight; the loss alone is timed as well. `transformers` runs its sequential
path, as it does wherever its CUDA kernels are not, with one thread and with one a core: its many small
operations can be slower with more. What it is compared by is the faster of the two.

python -m experiments.benchmarks.mamba_cpu
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from safetensors.torch import save_file

import frugax
from experiments.benchmarks.interleaved import about, milliseconds, save, worst_error

RESULTS = Path(__file__).parent / "results" / "mamba_cpu.json"


def torch_loss(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    ids = torch.tensor(tokens)
    logits = model(ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def torch_programs(model: torch.nn.Module, tokens: np.ndarray, threads: int) -> dict[str, Callable[[], Any]]:
    """Calls that return the loss; "step" leaves the gradient in the model."""

    def step() -> float:
        torch.set_num_threads(threads)
        model.zero_grad(set_to_none=True)
        loss = torch_loss(model, tokens)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def loss() -> float:
        torch.set_num_threads(threads)
        return torch_loss(model, tokens).item()

    return {"step": step, "loss": loss}


def jax_programs(module: frugax.layers.Decoder, variables: dict, tokens: np.ndarray):
    """(calls that return the loss, "step" with the gradient; the bytes of the step's temporaries)."""
    ids = jnp.asarray(tokens)

    def loss_fn(variables):
        logits, _ = module.apply(variables, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    step = jax.jit(jax.value_and_grad(loss_fn)).lower(variables).compile()
    loss = jax.jit(loss_fn).lower(variables).compile()
    programs = {
        "step": lambda: step(variables),
        "loss": lambda: loss(variables),
    }
    return programs, step.memory_analysis().temp_size_in_bytes


def save_model(model: transformers.PreTrainedModel, folder: Path, gradients: bool) -> None:
    """The model's folder, with each weight's gradient in its place if `gradients`."""
    model.save_pretrained(folder)
    if gradients:
        save_file({n: p.grad.contiguous() for n, p in model.named_parameters()}, folder / "model.safetensors")


def measure(sizes: dict[str, int], batch: int, time_steps: int, repeats: int) -> dict:
    """Milliseconds of each; raises if losses or gradients differ."""
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).train()
    tokens = np.random.default_rng(0).integers(sizes["vocab_size"], size=(batch, time_steps))
    threads = {f"transformers, {n} threads": n for n in (1, os.cpu_count() or 1)}
    programs = {name: torch_programs(model, tokens, n) for name, n in threads.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder), gradients=False)
        module, variables = frugax.layers.pretrained.load(folder)
        loss = next(iter(programs.values()))["step"]()
        save_model(model, Path(folder), gradients=True)
        _, want = frugax.layers.pretrained.load(folder)
    ours, temporaries = jax_programs(module, variables, tokens)
    got_loss, got = ours["step"]()
    errors = {"loss": abs(float(got_loss) / loss - 1), "gradient": worst_error(got, want)}
    if not max(errors.values()) < 1e-4:
        raise AssertionError(f"the two differ by {errors}; no time is worth reporting")
    programs["frugax"] = ours
    result: dict[str, Any] = {}
    for what in ("step", "loss"):
        times = milliseconds({name: calls[what] for name, calls in programs.items()}, repeats + 1)
        medians = {name: float(np.median(of_one[1:])) for name, of_one in times.items()}  # one warms up
        result[what] = {f"{name}, median_ms": round(median, 1) for name, median in medians.items()}
        fastest = min(medians[name] for name in threads)
        result[what]["times_faster"] = round(fastest / medians["frugax"], 1)
    return result | {
        "frugax_step_temporary_MB": round(temporaries / 1e6, 1),
        "relative_errors": {name: float(f"{error:.1e}") for name, error in errors.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--time", type=int, default=256, help="tokens a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    sizes = {"vocab_size": 256, "hidden_size": args.width, "num_hidden_layers": args.layers, "state_size": 16}
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "sizes": sizes | {"batch": args.batch, "time": args.time},
        "repeats": args.repeats,
        "result": measure(sizes, args.batch, args.time, args.repeats),
    }
    save(args.out, about() | result)


if __name__ == "__main__":
    main()
