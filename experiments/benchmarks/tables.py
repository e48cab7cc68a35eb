"""The tables of README.md and docs/, from the code and experiments/benchmarks/results: never written by hand.

python -m experiments.benchmarks.tables           rewrite them
python -m experiments.benchmarks.tables --check   say whether they are as this would write them
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from frugax.memory import POLICIES
from frugax.papers import families, papers

from . import planning
from .markdown import RESULTS, caption, plain_caption, read, table
from .sentences import five_numbers, what_runs_where, what_steps_take, where_it_loses

ROOT = Path(__file__).parents[2]
METHODS = ("nearest", "gptq", "gptq_sequential", "awq")
BY_TURNS = "Contenders run by turns; a ratio is the median over turns, not the ratio of the medians."


def linear_attention_cpu() -> str:
    result = read("linear_attention_cpu")
    rows = [
        [r["gate"], r["contender"], r["median_ms"], r["temporaries_mb"], f"{r['time_over_frugax']}x"]
        for r in result["rows"]
    ]
    head = ["gate", "", "median ms", "temporaries MB", "time over frugax"]
    return f"{caption(result)} {BY_TURNS}\n\n{table(head, rows)}"


def tpu_schedule(operation: str) -> str:
    result = read(f"tpu_schedule_{operation}")
    rows = []
    for r in result["rows"]:
        if "error" in r:
            rows.append([r["kernel"], r["chip"], "does not compile", *[""] * 5])
            continue
        share = f"{100 * r['matrix_share']:.0f} %"
        rows.append([r["kernel"], r["chip"], f"{r['cycles']:,}", f"{r['copies']:,}", f"{r['floor']:,}"])
        rows[-1] += [f"{r['ratio']:.2f}x", share, f"{r['spills']:,}"]
    head = ["kernel", "chip", "cycles", "copies", "floor", "total over floor", "matrix unit", "spills"]
    versions = f"jax {result['jax']}, libtpu {result['libtpu']}"
    about = f"{result['shapes'].splitlines()[0]} {versions}, {result['date']}."
    return f"{about}\n\n{table(head, rows)}"


def tpu_grouped_matmul() -> str:
    """Cycles beside megablox's in whichever of its tile sizes takes it least."""
    result = read("tpu_schedule_grouped_matmul")
    found = {(r["kernel"], r["chip"]): r for r in result["rows"] if "error" not in r}
    rows = []
    for (kernel, chip), r in found.items():
        if "megablox" in kernel:
            continue
        rivals = [
            x for (name, on), x in found.items() if on == chip and name.startswith(f"{kernel} megablox")
        ]
        best = min(rivals, key=lambda x: x["cycles"])
        sizes, ratio = best["kernel"].split()[-1], r["cycles"] / best["cycles"]
        least = max(r["cycles"], r["floor"]) / max(best["cycles"], r["floor"])
        rows.append([kernel, chip, f"{r['cycles']:,}", f"{best['cycles']:,}", sizes, f"{ratio:.2f}x"])
        rows[-1] += [f"{least:.2f}x", f"{r['floor']:,}"]
    head = ["kernel", "chip", "cycles", "megablox", "its tiles", "ratio", "with the floor", "floor"]
    versions = f"jax {result['jax']}, libtpu {result['libtpu']}"
    return f"{result['shapes'].splitlines()[0]} {versions}, {result['date']}.\n\n{table(head, rows)}"


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


def hopper(operation: str) -> str:
    result = read(f"gpu_{operation}_deviceless")
    rows = [
        [call["what"], f"`{k['name']}`", k["registers"], k["spill_stores"], f"{k['shared_bytes']:,}"]
        for call in result["rows"]
        for k in call["kernels"]
    ]
    head = ["call", "kernel", "registers", "bytes spilled", "shared memory, bytes"]
    return f"{result['chip']}, jax {result['versions']['jax']}, {result['date']}.\n\n{table(head, rows)}"


def taylor_memory() -> str:
    result = read("gpu_linear_attention_deviceless")
    rows = [
        [f"B={r['B']} T={r['T']} H={r['H']} K={r['K']} V={r['V']}", *r["temporary_MB"].values()]
        for r in result["rows"]
        if "temporary_MB" in r
    ]
    head = ["call, with its gradient", "kernels, MB", '`backend="xla"`, MB', "features in memory, MB"]
    return f"{result['chip']}, jax {result['versions']['jax']}, {result['date']}.\n\n{table(head, rows)}"


def training() -> str:
    rows = []
    for path in sorted(RESULTS.glob("train_*.json")):
        r = json.loads(path.read_text())
        minutes = (r["compile_seconds"] + r["training_seconds"] + r["evaluation_seconds"]) / 60
        row = [f"`{path.stem.removeprefix('train_')}`", f"{r['parameters']:,}", f"{minutes:.1f}"]
        held_out = [
            f"{r[name]:.3f}"
            for name in ("held_out_bits_per_byte", "gzip_bits_per_byte", "order3_bits_per_byte")
        ]
        machine = r["machine"] + ("; " + r["note"] if "note" in r else "")
        rows.append([*row, *held_out, f"{r['held_out_bytes']:,}", machine, f"jax {r['jax']}, {r['date']}"])
    head = ["config", "parameters", "minutes", "held out", "gzip -9", "order-3 bytes", "bytes held out"]
    text = "Bits per byte of files that were held out; minutes hold compilation and evaluation."
    return f"{text}\n\n{table([*head, 'machine', 'versions'], rows)}"


def classification() -> str:
    rows, versions = [], set()
    for path in sorted(RESULTS.glob("classify_*.json")):
        run = json.loads(path.read_text())
        versions.add(f"jax {run['jax']}, {run['date']}")
        for name, r in run["results"].items():
            lengths = r.get("accuracy_by_length", {})
            longer = ", ".join(f"{length}: {100 * a:.0f}" for length, a in lengths.items())
            task = f"`{path.stem.removeprefix('classify_')}`"
            rows.append([task, name, f"{r.get('parameters', ''):,}" if "parameters" in r else ""])
            rows[-1] += [f"{100 * r['accuracy']:.1f}", longer]
    head = ["config", "", "parameters", "accuracy, %", "at other lengths, %"]
    return f"Held out. {'; '.join(sorted(versions))}.\n\n{table(head, rows)}"


def optimizers_quality() -> str:
    result, rows = read("optimizers_quality"), []
    for name, runs in result["runs"].items():
        rate, best = min(runs.items(), key=lambda run: run[1]["held_out_bits_per_byte"])
        bits, loss = (f"{best[key]:.3f}" for key in ("held_out_bits_per_byte", "training_loss"))
        megabytes = [f"{best[key] / 1e6:.2f}" for key in ("state_bytes", "peak_bytes")]
        rows.append([f"`{name}`", rate, bits, loss, *megabytes])
    head = ["", "best rate", "held-out bits per byte", "training loss, nats", "state MB", "step's peak MB"]
    one = next(iter(next(iter(result["runs"].values())).values()))
    about = f"{one['parameters']:,} parameters, {one['steps']} steps of {one['bytes_a_step']} bytes"
    rates = "the best of three learning rates each, which is the middle one"
    return f"{about}, {rates}. jax {result['jax']}, {result['date']}.\n\n{table(head, rows)}"


def optimizer_steps() -> str:
    result, rows, adamw = read("optimizer_step_cpu"), [], []
    for rank, found in result["results"].items():
        for name, r in found.items():
            amortized = next(v for k, v in r.items() if k.startswith("over_adamw_amortized"))
            ratios = [f"{r['over_adamw_between_refreshes']}x", f"{amortized}x"]
            of_rank = "" if rank == "any rank" else rank.removeprefix("rank ")
            rows.append([f"`{name}`", of_rank, *ratios, r["state_bytes_per_parameter"]])
            adamw.append(r["adamw_ms"])
    head = ["", "rank", "step over `optax.adamw`'s", "amortized over 200", "state bytes a parameter"]
    about = f"{result['parameters']:,} parameters, float32"
    own = f"AdamW's own step {min(adamw):.0f} to {max(adamw):.0f} ms"
    return f"{about}; {own}. {plain_caption(result)} {BY_TURNS}\n\n{table(head, rows)}"


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


def mezo_finetune() -> str:
    result, rows = read("mezo_finetune"), []
    for name, r in result["rows"].items():
        sizes = [r[key] / 1e6 for key in ("state_bytes", "step_temporaries", "inference_temporaries")]
        loss = f"{r['loss_before']:.3f} to {r['loss']:.3f}"
        rows.append([name, r["steps"], loss, f"{100 * r['accuracy']:.0f}", *(f"{x:.1f}" for x in sizes)])
    head = ["", "steps", "loss", "accuracy, %", "state MB", "step's temporaries MB", "a forward pass's"]
    about = f"{result['task']}, {result['parameters']:,} parameters"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def layerwise_memory() -> str:
    result = read("layerwise_memory")
    rows = [
        [name, f"{r['temporaries'] / 1e6:.1f}", f"{r['state'] / 1e6:.1f}"]
        for name, r in result["rows"].items()
    ]
    about = f"{result['model']}, {result['parameters']:,} parameters"
    return f"{about}. {plain_caption(result)}\n\n{table(['', 'temporaries MB', 'state MB'], rows)}"


def policies() -> str:
    """Tabulate the policies of rematerialization and what each keeps."""
    return table(["`memory.remat`", "a layer keeps"], [[f'"{n}"', p.keeps] for n, p in POLICIES.items()])


def memory() -> str:
    """Tabulate temporaries on the device and bytes on the host, by way and chip."""
    result, names = read("memory"), {"v5e": "v5e", "h200": "H200"}
    rows = [
        [f"`{way}`", *(f"{on[chip][key] / 1e6:,.0f}" for chip in names for key in ("temporaries", "host"))]
        for way, on in result["rows"].items()
    ]
    head = [
        "`memory.remat`, and others",
        *(f"{name}{of}" for name in names.values() for of in (", MB", ", host MB")),
    ]
    return f"{result['model']}. jax {result['jax']}, {result['date']}.\n\n{table(head, rows)}"


def zo_queries() -> str:
    result, rows = read("zo_queries"), []
    shown = [i for i, queries in enumerate(result["queries"]) if queries in (600, 1800, 3600, 6000)]
    for name, r in result["rows"].items():
        accuracy = [f"{100 * r['accuracy'][i]:.1f}" for i in shown]
        rows.append([name, r["queries_of_a_step"], f"{r['rate']:.0e}", *accuracy])
    head = ["", "queries of a step", "rate", *(f"{result['queries'][i]} queries" for i in shown)]
    about = f"Accuracy, %, over forward passes: {result['task']}; {result['parameters']:,} parameters, "
    about += f"{100 * result['accuracy_before']:.1f} % to begin with, the mean of {result['seeds']} seeds"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def formats() -> str:
    result = read("formats")
    rows = [
        [f"`{name}`", r["bits"], r["group"], r["scales"], *(f"{x:.4f}" for x in r["error"].values())]
        for name, r in result["formats"].items()
    ]
    head = ["", "bits stored", "elements of a scale", "scales", "N(0, 1)", "Student's t, 4 degrees"]
    about = f"Matrices of {' x '.join(map(str, result['shape']))}, relative rms error"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def minifloats() -> str:
    columns = ["integer", *(f"e{n}" for n in range(1, 6))]
    rows = []
    for bits, found in read("formats")["minifloats"].items():
        for distribution, name in (("normal", "N(0, 1)"), ("student_t4", "Student's t")):
            least = min(r[distribution] for r in found.values())
            cells = [f"{found[c][distribution]:.4f}" if c in found else "" for c in columns]
            bold = [f"**{c}**" if c == f"{least:.4f}" else c for c in cells]
            rows.append([bits, name, *bold])
    return table(["bits", "", "integer", *(f"exponent of {n}" for n in range(1, 6))], rows)


def bipolar() -> str:
    rows = [
        [bits, *(f"{found[what][d]:.4f}" for d in ("normal", "zeros") for what in ("bipolar", "integer"))]
        for bits, found in read("formats")["bipolar"].items()
    ]
    head = ["bits", "N(0, 1), bipolar", "integer", "four fifths zeros, bipolar", "integer"]
    return table(head, rows)


def minilm() -> str:
    result, rows = read("minilm"), []
    methods = list(dict.fromkeys(method for row in result["rows"].values() for method in row))
    for format, found in result["rows"].items():
        cells = [
            f"{100 * found[m]['output_error']:.2f} / {found[m]['one_minus_cosine']:.4f}" if m in found else ""
            for m in methods
        ]
        rows.append([f"`{format}`", *cells])
    about = f"Statistics of {result['tokens']:,} tokens, errors on {result['held_out_tokens']:,} others"
    return f"{about}. {plain_caption(result)}\n\n{table(['', *(m.replace('_', ' ') for m in methods)], rows)}"


def minifloat_digits() -> str:
    """Tabulate a vision transformer in minifloats and integers, by method."""
    result, rows = read("minifloat_digits"), []
    for format, bases in result["rows"].items():
        for base, found in bases.items():
            cells = [f"{100 * accuracy:.1f} / {100 * error:.1f}" for accuracy, error in found.values()]
            rows.append([f"`{format}`", base, *cells])
    seeds = result["settings"]["seeds"]
    about = f"{100 * result['accuracy']:.1f} % in float32; {result['held_out']} images, {seeds} models' mean"
    head = ["", "weights by", *next(iter(next(iter(result["rows"].values())).values()))]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def low_bit() -> str:
    """Tabulate a trained decoder in every format, by every method."""
    result = read("low_bit")
    by_format: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        by_format.setdefault(row["format"], {})[row["method"]] = row
    exact = by_format["bfloat16"]["none"]["held_out_bits_per_byte"]
    speed = result["decoded_tokens_per_second"]
    rows = []
    for format, found in by_format.items():
        cells = [f"{found[m]['held_out_bits_per_byte']:.3f}" if m in found else "" for m in METHODS]
        only = next((f"{r['held_out_bits_per_byte']:.3f}" for m, r in found.items() if m not in METHODS), "")
        best = min(r["held_out_bits_per_byte"] for r in found.values()) / exact - 1
        name = f"`{format}`, trained" if "trained" in found else f"`{format}`"
        ratio = f"{speed[format] / speed['float32']:.2f}x" if format in speed else ""
        rows.append([name, f"{next(iter(found.values()))['bytes']:,}"])
        rows[-1] += [only, *[""] * (len(METHODS) - 1)] if only else cells
        rows[-1] += ["" if format == "bfloat16" else f"{100 * best:+.1f} %", ratio]
    model = result["model"]
    about = f"`{model['config']}`, {model['parameters']:,} parameters, "
    about += f"{result['held_out_bytes']:,} held-out bytes"
    methods = [method.replace("_", " ") for method in METHODS]
    head = ["", "bytes", *methods, "best against bfloat16", "tokens a second against float32"]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def qmoe() -> str:
    """Tabulate experts in ternary weights by each method, and what codewords of a dictionary take."""
    result, rows = read("qmoe"), []
    for r in result["rows"]:
        cells = [f"{100 * r['zeros']:.1f} %", f"{r['entropy']:.3f}"] if "zeros" in r else ["", ""]
        if "codewords" in r:
            cells += [
                f"{r['codewords']:.3f}",
                f"{r['bits_per_weight']:.3f}",
                f"{100 * r['output_error']:.1f} %",
            ]
        else:
            cells += ["", f"{r['bits_per_weight']:.0f}", ""]
        name = "as they were" if r["method"] == "none" else r["method"]
        rows.append([name, *cells, f"{r['bits_per_byte']:.3f}"])
    fewest, most = result["tokens_of_an_expert"].values()
    about = (
        f"{result['expert_weights']:,} weights of experts with 512 inputs, {fewest:,} to {most:,} tokens of "
    )
    about += f"statistics each, {result['held_out_bytes']:,} held-out bytes"
    head = ["", "zeros", "entropy", "codewords", "bits a weight in all", "output error", "bits per byte"]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def low_bit_training() -> str:
    """Tabulate what each option of low-bit training costs, beside float32."""
    result, rows = read("low_bit_training"), []
    for name, r in result["rows"].items():
        bits = sum(r["held_out_bits_per_byte"]) / len(r["held_out_bits_per_byte"])
        gap = "" if name == "float32" else f"{r['gap']:+.3f} +- {r['standard_error']:.3f}"
        rows.append([name, f"{bits:.3f}", gap])
    about = (
        f"{result['model']}, {result['steps']} steps of {result['batch'][0]} x {result['batch'][1]} bytes, "
    )
    about += f"the mean of {result['seeds']} seeds"
    head = ["", "held-out bits per byte", "beyond float32"]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def qlora() -> str:
    """Tabulate what LoRA reaches beside bases in fewer and fewer bits."""
    result = read("qlora")
    rows = [
        [
            f"`{r['base']}`",
            f"{r['bytes_of_matrices']:,}",
            *(f"{r[f'bits_per_byte_{when}']:.3f}" for when in ("before", "after")),
        ]
        for r in result["rows"]
    ]
    about = f"Rank {result['rank']}, {result['steps']} steps, {result['held_out_bytes']:,} bytes held out"
    head = ["base", "bytes of matrices", "bits per byte before", "after"]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def mamba_lyapunov() -> str:
    """Tabulate what bfloat16 and LoRA change in a Mamba and in a Transformer, and the Mamba's exponents."""
    result = read("mamba_lyapunov")
    models = ("mamba", "transformer")

    def change(way: str, start: str, key: str) -> list[str]:
        return [f"{result['tuning'][model][way]['from ' + start][key]:.4f}" for model in models]

    rows = [
        [
            "bfloat16 from float32, same weights",
            *(f"{result['bfloat16_logits'][m]['mean']:.4f}" for m in models),
        ]
    ]
    for way, start in (("full bfloat16", "full float32"), ("lora bfloat16", "lora float32")):
        rows.append([f"{way} from {start}, after tuning", *change(way, start, "logits")])
    rows.append(
        ["lora float32 from full float32, after tuning", *change("lora float32", "full float32", "logits")]
    )
    rows.append(["the same in bits per byte", *change("lora float32", "full float32", "bits_per_byte")])
    exponents = [
        [i, f"{layer['estimate']:.6f}", f"{layer['closed_form']:.6f}", f"{layer['largest_estimate']:.6f}"]
        for i, layer in enumerate(result["exponents"])
    ]
    sizes, gaps = result["sizes"], result["bfloat16_states"]
    text = f"{sizes['steps']} steps of training on bytes, then {sizes['tune_steps']} of tuning"
    first = table(["relative change of logits", "Mamba", "Transformer"], rows)
    second = table(["block", "largest exponent, estimated", "closed form", "largest of rows"], exponents)
    states = (
        "States kept in bfloat16 differ from those in float32 by {at_a_quarter:.2g} after a quarter of a row"
    )
    states = (states + " and {at_the_end:.2g} after all of it").format(**gaps["trained"])
    states += f", in a control of positive exponents by {gaps['control']['at_the_end']:.0e}."
    return f"{text}. {plain_caption(result)}\n\n{first}\n\n{second}\n\n{states}"


def memory_bank() -> str:
    result = read("memory_bank")
    keys = ("common", *(f"quarter {i + 1}" for i in range(4)))
    rows = [
        [name, f"{r['resident']:,}", f"{r['stored']:,}", *(f"{100 * mean(r[k]):.1f}" for k in keys)]
        for name, r in result["rows"].items()
    ]
    head = ["", "parameters resident", "stored", "shared facts", "popular quarter", "2nd", "3rd", "rarest"]
    about = f"Right answers, %, about {result['subjects']:,} subjects, the mean of {result['seeds']} seeds"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def moe_routers() -> str:
    """Tabulate routers by loss, loads and what a capacity would drop."""
    result = read("moe_routers")

    def share(row: dict, key: str) -> str:
        return f"{100 * row[key]:.1f}" if key in row else ""

    rows = [
        [
            name,
            f"{r['parameters']:,}",
            f"{mean(r['held_out_bits_per_byte']):.3f}",
            f"{r['gap']:+.3f} +- {r['standard_error']:.3f}",
            f"{r['load_entropy']:.3f}" if "load_entropy" in r else "",
            *(share(r, key) for key in ("dropped_share", "active_share", "active_share_of_chunks")),
        ]
        for name, r in result["rows"].items()
    ]
    head = ["channel mixer", "parameters", "bits a byte", "beside softmax", "entropy of loads", "dropped, %"]
    head += ["experts of a token, %", "of 8 tokens, %"]
    about = f"{result['model']}; {result['steps']} steps, {result['seeds']} seeds"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


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


def recall() -> str:
    """Tabulate the share of values recalled over the bytes of a state."""
    result = read("recall")
    names = {
        "window": "window of exact attention",
        "taylor": "linear attention, Taylor features",
        "based": "both (Based)",
        "gla": "gated linear attention",
        "mamba2": "Mamba-2",
    }
    rows = [
        [names[r["kind"]], r["size"], f"{r['state_bytes']:,}", f"{100 * r['recalled']:.1f} %"]
        for r in result["rows"]
    ]
    rates = " and ".join(map(str, result["learning_rates"]))
    about = (
        f"{result['pairs']} pairs a row; {result['width']} wide; {result['steps']} steps at the rates {rates}"
    )
    head = ["mixer", "size", "bytes of a state", "recalled"]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def parallel_block() -> str:
    """Tabulate parallel blocks beside serial ones."""
    result = read("parallel_block")
    rows = [
        [
            f"`{r['mixer']}`",
            r["block"],
            f"{r['parameters']:,}",
            f"{mean(r['held_out_bits_per_byte']):.3f}",
            f"{r['gap']:+.3f} +- {r['standard_error']:.3f}" if "gap" in r else "",
        ]
        for r in result["rows"]
    ]
    size = f"{result['layers']} layers, {result['width']} wide; {result['steps']} steps"
    about = f"{size} at a rate of {result['learning_rate']}, {result['seeds']} seeds"
    head = ["mixer", "block", "parameters", "bits a byte", "beside serial"]
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def expert_placement() -> str:
    result = read("expert_placement")
    rows = [
        [name, *(f"{r[key]:.2f}" for key in ("busiest_over_mean", "worst_step"))]
        + [f"{r[key]:.1f}" for key in ("token_MB", "expert_MB")]
        for name, r in result["rows"].items()
    ]
    head = ["", "tokens of the busiest device over the mean", "in the worst step", "tokens MB", "experts MB"]
    return f"{result['model']}. {plain_caption(result)}\n\n{table(head, rows)}"


def m3vit_digits() -> str:
    result = read("m3vit_digits")
    rows = [
        [
            name,
            f"{r['parameters']:,}",
            f"{r['active']:,}",
            *(f"{100 * mean(r[task]):.1f}" for task in ("digit", "above four")),
            f"{mean(r['edges']):.3f}",
            f"{100 * mean(r['mean difference']):+.1f} %",
        ]
        for name, r in result["rows"].items()
    ]
    head = [
        "",
        "parameters",
        "that a task meets",
        "digit, %",
        "above four, %",
        "error of edges",
        "on average",
    ]
    settings = result["settings"]
    about = f"{settings['steps']} steps, {result['held_out']} held out, the mean of {settings['seeds']} seeds"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def family_rows() -> str:
    """Tabulate the families of papers: one row each, with its methods."""
    rows = []
    for name, about in families().items():
        anchor = name.replace("_", "-")
        methods = ", ".join(f"`{paper.slug}`" for paper in papers() if paper.family == name)
        rows.append([f"[{name.replace('_', ' ')}](docs/papers.md#{anchor})", about, methods])
    return table(["family", "what it holds", "papers"], rows)


def every_paper() -> str:
    """Tabulate lib/papers/, a section for each family."""
    sections = []
    for family, about in families().items():
        rows = []
        for paper in (paper for paper in papers() if paper.family == family):
            title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})"
            symbols = ", ".join(f"`{symbol.removeprefix('frugax.')}`" for symbol in paper.symbols)
            rows.append([f"`{paper.slug}`", f"{title}, {paper.year}", symbols, paper.left_out, paper.note])
        head = ["", "paper", "in `frugax`", "left out", "what differs"]
        sections.append(
            f"## {family.replace('_', ' ').capitalize()}\n\nHolds {about}.\n\n{table(head, rows)}"
        )
    return "\n\n".join(sections)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "families": family_rows,
        "what_runs_where": what_runs_where,
        "five_numbers": five_numbers,
        "where_it_loses": where_it_loses,
    },
    "docs/papers.md": {"papers": every_paper},
    "docs/how-to/memory.md": {"policies": policies, "memory": memory},
    "docs/operations/linear_attention.md": {"taylor_memory": taylor_memory},
    "docs/results/cpu.md": {
        "linear_attention_cpu": linear_attention_cpu,
        "length_cpu": length_cpu,
        "recurrences_cpu": recurrences_cpu,
        "rnn_cpu": rnn_cpu,
        "quantized_matmul_cpu": quantized_matmul_cpu,
        "grouped_matmul_cpu": grouped_matmul_cpu,
        "mamba_cpu": mamba_cpu,
    },
    "docs/results/training.md": {
        "training": training,
        "classification": classification,
        "qlora": qlora,
        "mamba_lyapunov": mamba_lyapunov,
        "low_bit_training": low_bit_training,
        "parallel_block": parallel_block,
        "recall": recall,
    },
    "docs/results/experts.md": {
        "moe_routers": moe_routers,
        "expert_placement": expert_placement,
        "m3vit_digits": m3vit_digits,
        "memory_bank": memory_bank,
    },
    "docs/results/planning.md": {
        "memory_estimators": planning.memory_estimators,
        "frontier_terms": planning.frontier_terms,
        "frontier_trends": planning.frontier_trends,
        "frontier_best": planning.frontier_best,
        "attention_balance": planning.attention_balance,
        "groups_of_degrees": planning.groups_of_degrees,
        "pods": planning.pods,
    },
    "docs/results/formats.md": {
        "formats": formats,
        "minifloats": minifloats,
        "bipolar": bipolar,
        "minilm": minilm,
        "minifloat_digits": minifloat_digits,
        "low_bit": low_bit,
        "qmoe": qmoe,
    },
    "docs/results/optimizers.md": {
        "optimizers_quality": optimizers_quality,
        "optimizer_steps": optimizer_steps,
        "what_steps_take": what_steps_take,
        "layerwise_memory": layerwise_memory,
        "mezo_finetune": mezo_finetune,
        "zo_queries": zo_queries,
    },
    "docs/results/compiled.md": {
        "tpu_linear_attention": partial(tpu_schedule, "linear_attention"),
        "tpu_selective_scan": partial(tpu_schedule, "selective_scan"),
        "tpu_rnn": partial(tpu_schedule, "rnn"),
        "tpu_quantized_update": partial(tpu_schedule, "quantized_update"),
        "tpu_quantized_matmul": partial(tpu_schedule, "quantized_matmul"),
        "tpu_grouped_matmul": tpu_grouped_matmul,
        "hopper_linear_attention": partial(hopper, "linear_attention"),
        "hopper_selective_scan": partial(hopper, "selective_scan"),
        "hopper_rnn": partial(hopper, "rnn"),
        "hopper_adam_8bit": partial(hopper, "adam_8bit"),
        "hopper_quantized_matmul": partial(hopper, "quantized_matmul"),
        "hopper_grouped_matmul": partial(hopper, "grouped_matmul"),
    },
}


def rewritten(page: str) -> str:
    """Make everything between `<!-- table NAME -->` and `<!-- end -->` of a page anew; return the text."""
    text = (ROOT / page).read_text()
    for name, make in PAGES[page].items():
        start, end = f"<!-- table {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{page}: got no place for the table {name}; expected {start.strip()}")
        _, _, after = rest.partition(end)
        text = before + start + make() + end + after
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if one is out of date")
    check = parser.parse_args().check
    for page in PAGES:
        new = rewritten(page)
        if check and new != (ROOT / page).read_text():
            sys.exit(f"{page}: tables out of date; `python -m experiments.benchmarks.tables` writes them")
        (ROOT / page).write_text(new)


if __name__ == "__main__":
    main()
