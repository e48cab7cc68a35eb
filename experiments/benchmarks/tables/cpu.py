"""Tables of docs/results/cpu.md: times on a CPU beside peers."""

from experiments.trainer.kept_memory import KEPT

from ..markdown import BY_TURNS, caption, plain_caption, read, table


def linear_attention_cpu() -> str:
    result = read("linear_attention_cpu")
    rows = [
        [r["gate"], r["contender"], r["median_ms"], r["temporaries_mb"], f"{r['time_over_frugax']}x"]
        for r in result["rows"]
    ]
    head = ["gate", "", "median ms", "temporaries MB", "time over frugax"]
    return f"{caption(result)} {BY_TURNS}\n\n{table(head, rows)}"


def length_cpu() -> str:
    """Tabulate the time of a token of lightning attention over length."""
    result = read("length_cpu")
    rows = [
        [f"{r['tokens']:,}", f"{r['forward_ns'] / 1e3:.2f}", f"{r['forward_and_gradient_ns'] / 1e3:.2f}"]
        for r in result["rows"]
    ]
    head = ["tokens", "forward, CPU us a token", "forward and gradient"]
    about = f"{result['heads']} heads of {result['width']}, medians of {result['turns']} turns"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def recurrences_cpu() -> str:
    rows, about = [], []
    for name in ("linear_recurrence", "causal_conv1d"):
        result = read(f"{name}_cpu")
        about.append(f"`{name}`: {result['date']}, jax {result['jax']}, {result['machine']}")
        found = result["results"]
        by_shape = {str(result["shape"]): found} if "shape" in result else found
        for shape, times in by_shape.items():
            rows += [
                [f"`{name}`", shape, what, r["median_ms"], r["temporary_MB"]] for what, r in times.items()
            ]
    head = ["operation", "shape", "", "median ms", "temporaries MB"]
    return "; ".join(about) + f".\n\n{table(head, rows)}"


def rnn_cpu() -> str:
    result = read("rnn_cpu")
    rows = [
        [shape, what, r["median_ms"], f"{r['time_over_frugax']}x", r["temporary_MB"] or ""]
        for shape, found in result["results"].items()
        for what, r in found.items()
    ]
    head = ["batch, time, channels", "", "median ms", "time over frugax", "temporaries MB"]
    about = f"LSTM, {result['dtype']}; torch {result['torch']}, flax {result['flax']}"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def quantized_matmul_cpu() -> str:
    """Tabulate products with a packed matrix, beside float32's."""
    result, rows = read("quantized_matmul_cpu"), []
    for tokens, found in result["results"].items():
        for name, r in found.items():
            ratio = f"{r['times_as_fast_as_float32']}x"
            rows.append([tokens, name, r["weights_MB"], r["median_ms"], r["min_ms"], ratio])
    head = ["", "", "weights MB", "median ms", "least ms", "times as fast as float32"]
    return f"{plain_caption(result)} {BY_TURNS}\n\n{table(head, rows)}"


def grouped_matmul_cpu() -> str:
    """Tabulate products of rows with experts, and a mixture's step, beside dense ones."""
    result, rows = read("grouped_matmul_cpu"), []
    for shape, found in result["results"].items():
        for name, r in found.items():
            ratios = f"{r['times_the_dense']}x", f"{r['cpu_times_the_dense']}x"
            rows.append([shape, name, r["median_ms"], *ratios, r["temporary_MB"]])
    head = ["", "", "median ms", "times the dense", "CPU seconds, times the dense", "temporaries MB"]
    return f"{plain_caption(result)} {BY_TURNS}\n\n{table(head, rows)}"


def kept_memory_cpu() -> str:
    """Tabulate a training step by what malloc does with memory."""
    result, rows = read("kept_memory_cpu"), []
    for way, r in result["ways"].items():
        low, middle, high = r["times_faster"].values()
        faster = f"{middle}x ({low} to {high})"
        rows.append([way, r["ms_a_step"], f"{r['page_faults_a_step']:,.0f}", r["peak_MB"], faster])
    head = ["", "ms a step", "page faults a step", "peak MB", "times faster (quartiles)"]
    return f"{plain_caption(result)} Kept: `GLIBC_TUNABLES={KEPT}`.\n\n{table(head, rows)}"


def mamba_cpu() -> str:
    result = read("mamba_cpu")
    sizes = ", ".join(f"{k} {v}" for k, v in result["sizes"].items())
    rows = []
    for what, times in result["result"].items():
        if what in ("step", "loss"):
            medians = {k.removesuffix(", median_ms"): v for k, v in times.items() if k.endswith("median_ms")}
            rows += [[what, name, ms] for name, ms in medians.items()]
            rows[-1].append(f"{times['times_faster']}x faster than the faster `transformers`")
    about = (
        f"{sizes}; transformers {result['transformers']}, torch {result['torch']}. {plain_caption(result)}"
    )
    return f"{about}\n\n{table(['', '', 'median ms', ''], [[*row, ''][:4] for row in rows])}"
