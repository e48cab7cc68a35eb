"""Tables of docs/results/planning.md, from the studies' JSON."""

from .markdown import plain_caption, read, table


def memory_estimators() -> str:
    """Tabulate estimators of memory by their errors on configs that nothing was fitted to."""
    result, rows = read("memory_estimators"), []
    for family, found in result["rows"].items():
        for name, r in found.items():
            shown = [f"{100 * r[key]:.1f}" for key in ("median", "largest")] + [f"{100 * r['signed']:+.1f}"]
            rows.append([family, name, *shown])
    head = ["", "estimator", "median error, %", "largest, %", "median with its sign, %"]
    about = f"{result['held_out']} of {result['configs_of_a_family']} configs a family held out"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"
