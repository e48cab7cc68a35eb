"""Tables of docs/how-to/parallel.md."""

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
