"""Tables of docs/results/training.md: trained models, tasks and studies of them."""

import json
from statistics import mean

from ..markdown import RESULTS, plain_caption, read, table


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
