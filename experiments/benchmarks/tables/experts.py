"""Tables of docs/results/experts.md."""

from statistics import mean

from ..markdown import plain_caption, read, table


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


def read_me() -> str:
    result = read("read_me")
    domains = ("code", "prose", "tables", "headers")

    def optional(row: dict, key: str, scale: float = 1) -> str:
        return f"{scale * mean(row[key]):.0f}" if key in row else ""

    rows = [
        [
            name,
            optional(r, "active neurons"),
            *(f"{mean(r[d]):.3f}" for d in domains),
            f"{mean(mean(r[d]) for d in domains):.3f}",
            optional(r, "own expert", 100),
        ]
        for name, r in result["rows"].items()
    ]
    head = ["", "neurons of a token in a layer", *domains, "mean", "to the domain's expert, %"]
    about = (
        f"Held-out bits a byte, the mean of {result['seeds']} seeds; {result['hidden']} neurons in a layer"
    )
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"
