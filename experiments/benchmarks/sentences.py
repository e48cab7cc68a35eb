"""The sentences of README.md that hold figures, from the code and the results."""

import contextlib
import io
from collections.abc import Callable

import jax
import jax.numpy as jnp

import frugax

from .markdown import read, table
from .optimizer_step_cpu import SHAPES

TRAIN, CPU, OPTIMIZERS, COMPILED = (
    f"docs/results/{page}.md" for page in ("training", "cpu", "optimizers", "compiled")
)

# Shapes of a call that `what_runs_where` asks about: heads of 64, or 512 channels.
CALLS = {
    "linear_attention": ((1, 4096, 8, 64),) * 4,
    "linear_recurrence": ((1, 4096, 512),) * 2,
    "causal_conv1d": ((1, 4096, 512), (4, 512)),
    "selective_scan": ((1, 4096, 512), (1, 4096, 512), (512, 16), (1, 4096, 16), (1, 4096, 16)),
    "ssd": ((1, 4096, 8, 64), (1, 4096, 8), (8,), (1, 4096, 1, 128), (1, 4096, 1, 128)),
    "rnn": ((1, 4096, 4, 4, 128), (4, 4, 128, 128)),
}
DTYPES = (jnp.bfloat16, jnp.float32)


def served(operation: str, dtype: jnp.dtype) -> dict[str, str]:
    """Ask `frugax.kernels.explain` for the backend of each platform."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in CALLS[operation]]
    with contextlib.redirect_stdout(io.StringIO()):
        lines = frugax.kernels.explain(operation, *arrays).splitlines()[1:]
    return dict(line.strip().split(": ", 1) for line in lines if not line.startswith(("  not ", "  by ")))


def what_runs_where() -> str:
    """Tabulate the backends of each operation; a cell names the dtypes where they differ."""
    rows = []
    for operation in CALLS:
        by_dtype = {jnp.dtype(dtype).name: served(operation, dtype) for dtype in DTYPES}
        cells = []
        for platform in ("cpu", "tpu", "cuda"):
            backends = {dtype: found[platform] for dtype, found in by_dtype.items()}
            if len(set(backends.values())) == 1:
                cells.append(f"`{backends['float32']}`")
            else:
                cells.append(", ".join(f"{dtype} `{backend}`" for dtype, backend in backends.items()))
        rows.append([f"`{operation}`", *cells, "`xla`"])
    return table(["operation", "CPU", "TPU", "Hopper and newer", "other GPUs"], rows)


def five_numbers() -> str:
    """Tabulate what a newcomer should know first, each with the page that has the rest."""
    gates = {(r["gate"], r["contender"]): r for r in read("linear_attention_cpu")["rows"]}
    peer = gates["per_channel", "jax_linear_attention"]
    mamba = read("mamba_cpu")["result"]["step"]
    text, quick = read("train_python_25min"), read("train_quickstart")
    gzip = f"{text['gzip_bits_per_byte']:.2f}"
    runs = {name: _best(name) for name in ("adamw", "apollo")}
    ratio = runs["apollo"]["state_bytes"] / runs["adamw"]["state_bytes"]
    bits = {name: f"{run['held_out_bits_per_byte']:.2f}" for name, run in runs.items()}
    eight = read("optimizer_step_cpu")["results"]["any rank"]["adamw_8bit"]
    rows = [
        [
            "Gated linear attention, forward and gradient on a CPU",
            f"`jax-linear-attention` takes {peer['time_over_frugax']} times as long",
            CPU,
        ],
        [
            "Training step of a small Mamba on a CPU",
            f"{mamba['times_faster']} times as fast as `transformers` on PyTorch, "
            "which walks through time in Python where its CUDA kernels are not",
            CPU,
        ],
        [
            "Bits per byte of Python sources that were held out",
            f"{_bits(text)} after {_minutes(text)} minutes, {_bits(quick)} after {_minutes(quick)} "
            f"(quickstart); `gzip -9` {gzip}",
            TRAIN,
        ],
        [
            "APOLLO on a small Llama",
            f"{bits['apollo']} bits per byte where AdamW has {bits['adamw']}, with {ratio:.2f} of its state",
            OPTIMIZERS,
        ],
        [
            "8-bit AdamW",
            f"{eight['state_bytes_per_parameter']:.2f} bytes of state a parameter, not 8; on a CPU a step "
            f"takes {eight['over_adamw_between_refreshes']} times `optax.adamw`'s",
            OPTIMIZERS,
        ],
    ]
    return table(["", "", "more"], [[*cells, f"[{_name(page)}]({page})"] for *cells, page in rows])


def where_it_loses() -> str:
    """List what the results say against frugax."""
    rnn = [r for found in read("rnn_cpu")["results"].values() for r in found.items()]
    torch, flax = (
        [r["time_over_frugax"] for name, r in rnn if name.startswith(peer)] for peer in ("torch", "flax")
    )
    steps = read("optimizer_step_cpu")["results"]
    over: dict[str, list[float]] = {}
    for found in steps.values():
        for name, row in found.items():
            if "(" not in name:  # a variant by another projector or map
                over.setdefault(name, []).append(row["over_adamw_between_refreshes"])
    slower = sorted((n for n, ratios in over.items() if max(ratios) > 1), key=lambda n: -max(over[n]))
    quality = read("optimizers_quality")["runs"]
    adamw = _best("adamw")["held_out_bits_per_byte"]
    behind = [name for name in quality if _best(name)["held_out_bits_per_byte"] > adamw]
    vowels, digits, parity = (
        {name: f"{100 * r['accuracy']:.1f}" for name, r in read(f"classify_{task}")["results"].items()}
        for task in ("lmuformer_vowels", "vmamba_digits", "parity")
    )
    slow = {
        operation: max(r["ratio"] for r in read(f"tpu_schedule_{operation}")["rows"] if "ratio" in r)
        for operation in ("linear_attention", "selective_scan", "rnn", "quantized_update", "quantized_matmul")
    }
    quick = read("train_quickstart")
    gzip = f"{quick['gzip_bits_per_byte']:.2f}"
    no_float32 = [name for name in CALLS if served(name, jnp.float32)["cuda"] == "xla"]
    lines = [
        "No kernel here has been timed on a TPU or a GPU. What compilers say of them is in "
        f"[{_name(COMPILED)}]({COMPILED}): the slowest kernels on TPUs take, over their floor, "
        + ", ".join(f"`{name}` {ratio:.1f}" for name, ratio in slow.items())
        + " times.",
        f"On Hopper {_and(no_float32)} in float32 get `xla`, no kernel.",
        f"[On a CPU]({CPU}) PyTorch's LSTM takes {_range(torch)} times the time of ours, Flax's "
        f"{_range(flax)}.",
        f"[A step]({OPTIMIZERS}) takes, over `optax.adamw`'s on a CPU (two numbers: at ranks 16 to 160), "
        + ", ".join(f"`{name}` {_range(over[name])}" for name in slower)
        + " times.",
        f"{_and(behind)} end behind AdamW on the small Llama.",
        f"[Small classifiers]({TRAIN}) don't beat simple ones: LMUFormer {vowels['LMUFormer']} % "
        f"on spoken vowels, logistic regression {vowels['logistic regression']}; VSS {digits['VSS']} on "
        f"digits, nearest neighbour {digits['nearest neighbour']}. Mamba does not learn parity "
        f"({parity['Mamba']} %); an LSTM does ({parity['LSTM']}).",
        f"The quickstart's {_bits(quick)} bits per byte are behind `gzip -9` ({gzip}), "
        "which has seen the file that it compresses.",
        "Softmax attention has no kernel of ours yet: windows use `jax.nn.dot_product_attention`.",
        '`jax.jvp` and second derivatives need `backend="xla"` or `"reference"`.',
    ]
    return "\n".join(f"- {line}" for line in lines)


def what_steps_take() -> str:
    """Say what the methods behind the slowest steps ask for, at the benchmark's shapes and rank 64."""
    rank, history = 64, 20
    shapes = jax.tree.leaves(SHAPES["layers"], is_leaf=lambda x: isinstance(x, tuple))
    matrices = [(shape[0], min(shape[1:]), max(shape[1:])) for shape in shapes if len(shape) == 3]

    def total(count: Callable[[int, int], float]) -> str:
        """Sum of count(m, n) over all matrices, in units of 10^9."""
        return f"{sum(layers * count(m, n) for layers, m, n in matrices) / 1e9:.0f}"

    def published(m: int, n: int) -> int:
        return 5 * (4 * m * m * n + 2 * m**3)

    ours = total(lambda m, n: min(published(m, n), 4 * m * m * n + 34 * m**3))
    adamw = 12 * read("optimizer_step_cpu")["parameters"] / 1e9
    whole, chosen = total(lambda m, n: 2 * m * n * m), total(lambda m, n: 2 * m * n * rank)
    megabytes = total(lambda m, n: 4e3 * history * rank * n)
    return (
        f"AdamW calculates {adamw:.1f} GFLOP in a step. COSMOS's five Newton-Schulz steps on whole matrices "
        f"are {total(published)} GFLOP as published, {ours} in the order that a CPU gets here: that is the "
        f"method. Trion and DCT-AdamW choose their cosines anew at each step, a product of {whole} GFLOP of "
        f"which mirrored columns save half, and multiply with the chosen ones, {chosen} GFLOP, two or three "
        f"times. Natural GaLore reads the {megabytes} MB of its history twice."
    )


def _best(name: str) -> dict:
    runs = read("optimizers_quality")["runs"][name].values()
    return min(runs, key=lambda run: run["held_out_bits_per_byte"])


def _bits(run: dict) -> str:
    return f"{run['held_out_bits_per_byte']:.2f}"


def _minutes(run: dict) -> str:
    seconds = run["compile_seconds"] + run["training_seconds"] + run["evaluation_seconds"]
    return f"{seconds / 60:.0f}"


def _name(page: str) -> str:
    return page.rpartition("/")[2].removesuffix(".md")


def _and(names: list[str]) -> str:
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _range(ratios: list[float]) -> str:
    least, most = min(ratios), max(ratios)
    return f"{least}" if least == most else f"{least} to {most}"
