"""Tables of docs/results/formats.md: errors of number formats, and models in few bits."""

from ..markdown import plain_caption, read, table

METHODS = ("nearest", "gptq", "gptq_sequential", "awq")


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
