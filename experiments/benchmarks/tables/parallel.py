"""Tables of docs/how-to/parallel.md."""

from typing import Any

from frugax.parallel.activations import TENSOR_MESSAGES

from ..markdown import plain_caption, read, table


def collective_matmul() -> str:
    """Tabulate predicted times of products with their messages, whole and in pieces."""
    result, rows = read("collective_matmul_tpu"), []
    for r in result["rows"]:
        row = [", ".join(str(r[key]) for key in ("rows", "inner", "columns")), r["slice"].partition(":")[0]]
        for kind in ("gather", "scatter"):
            row += [f"{r[kind][key]:.0f}" for key in ("whole_us", "pieces_us", "waits_us")]
        rows.append(row)
    head = ["rows, inner, columns", f"{result['chips']} chips"]
    for kind in ("gather", "scatter"):
        head += [f"{kind}: whole, us", "in pieces", "of which it waits"]
    return f"{result['dtype']}; compiled on: {plain_caption(result)}\n\n{table(head, rows)}"


def tensor_messages() -> str:
    """Tabulate predicted steps by what devices along "tensor" send, those of a case in one row."""
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for r in read("tensor_messages_tpu")["rows"]:
        cases.setdefault((r["slice"], r["mixer"]), {})[r["messages"]] = r
    rows = []
    for (where, mixer), by in cases.items():
        row = [where, f"`{mixer}`"]
        for key, digits in (("step_ms", 1), ("exposed_ms", 1), ("gib", 2)):
            row.append(
                " / ".join(f"{by[way][key]:.{digits}f}" if way in by else "-" for way in TENSOR_MESSAGES)
            )
        rows.append(row)
    ways = " / ".join(TENSOR_MESSAGES)
    head = ["chips", "mixer", f"step, ms: {ways}", "of which it waits, ms", "GiB a chip"]
    first = next(iter(cases.values()))
    return f"Compiled on: {plain_caption(next(iter(first.values())))}\n\n{table(head, rows)}"
