"""Tables of docs/results/planning.md, from the studies' JSON."""

from .markdown import RESULTS, plain_caption, read, table


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


def memory_peaks() -> str:
    """Tabulate planned bytes of large steps for a GPU, beside the peak where it was measured."""
    measured = (RESULTS / "gpu_memory_peak_measured.json").exists()
    result = read(f"gpu_memory_peak_{'measured' if measured else 'deviceless'}")
    rows = []
    for r in result["rows"]:
        batch, gb = " x ".join(f"{n:,}" for n in r["batch"]), f"{r['compiled_bytes'] / 1e9:.1f}"
        rows.append([r["family"], f"{r['params'] / 1e6:,.0f} M", batch, gb])
        rows[-1] += [f"{r[f'{name}_over_compiled']:.2f}" for name in ("formulas", "liveness")]
        if measured:
            peak = f"{r['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in r else r["unmeasured"]
            rows[-1] += [peak, f"{r['compiled_over_peak']:.3f}" if "peak_bytes" in r else ""]
    head = ["", "params", "batch", "GB by the compiler", "formulas, of that", "liveness, of that"]
    head += ["GB measured", "compiler, of that"] if measured else []
    about = f"{result['chip']}, jax {result['versions']['jax']}, {result['date']}."
    return f"{about}\n\n{table(head, rows)}"


def frontier_terms() -> str:
    """Tabulate bytes by the cost model beside those of compiled programs."""
    result, rows = read("frontier"), []
    for mesh, terms in result["compared"].items():
        rows += [
            [mesh, name, f"{r['model']:,.0f}", f"{r['compiled']:,.0f}"]
            for name, r in terms.items()
            if r["model"] or r["compiled"]
        ]
    head = ["mesh", "bytes of a device", "model", "compiled"]
    return f"{plain_caption(result)}\n\n{table(head, rows)}"


def frontier_trends() -> str:
    """Tabulate shares of the peak as one size of a configuration changes."""
    rows = [
        [name, ", ".join(f"{size}: {100 * share:.0f}" for size, share in shares.items())]
        for name, shares in read("frontier")["trends"].items()
    ]
    return table(["22B on 64 dies", "bound of the share of the peak, %"], rows)


def frontier_best() -> str:
    """Tabulate the configurations that the search chooses."""
    axes = ("pipeline", "data", "fsdp", "tensor", "microbatch")
    rows = [
        [name, r["dies"], *(r[axis] for axis in axes), r["GB"], f"{100 * r['share_of_peak']:.0f}"]
        for name, r in read("frontier")["best"].items()
    ]
    return table(["", "dies", *axes, "GB a die", "bound of the share of the peak, %"], rows)


def attention_balance() -> str:
    """Tabulate ways to share the attention of packed documents out."""
    result = read("long_documents")
    rows = [
        [where, name, f"{r['imbalance']:.2f}", f"{r['GB']:.2f}"]
        for where, ways in result["attention"].items()
        for name, r in ways.items()
    ]
    head = ["", "attention", "busiest over mean", "GB moved, one layer forward"]
    about = f"Means of {result['batches']} batches"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


def groups_of_degrees() -> str:
    """Tabulate steps in groups of several degrees beside the best single degree."""
    rows = []
    for r in read("long_documents")["groups"]:
        degrees = " ".join(map(str, r["degrees"]))
        rows.append([r["sequences"], f"{r['longest']:,}", degrees, f"{r['seconds']:.2f}", r["best_degree"]])
        rows[-1].append(f"{r['its_seconds']:.2f}")
    head = ["sequences", "longest", "degrees of the groups", "seconds", "best single degree", "its seconds"]
    return table(head, rows)


def pods() -> str:
    """Tabulate the plans of the configs for pods."""
    rows = []
    for name, r in read("pods")["rows"].items():
        mesh = ", ".join(f"{axis} {n}" for axis, n in r["mesh"].items())
        sent, seconds = sum(r["sent_bytes"].values()), r["seconds"]
        rows.append(
            [
                f"`{name}`",
                r["topology"],
                mesh,
                f"{r['tokens_a_step'] / 1e6:.1f} M",
                f"{r['context']:,}",
                f"{(r['total_bytes'] + r['code_bytes']) / 2**30:.1f} of {r['memory_bytes'] / 2**30:.0f}",
                f"{sent / 1e9:.1f}",
                f"{1e3 * (seconds['step'] - seconds['exposed']):,.0f} + {1e3 * seconds['exposed']:,.0f}",
                f"{r['model_flops'] / r['executed_flops']:.2f}",
                f"{100 * r['mfu']:.0f} %",
            ]
        )
    about = next(iter(read("pods")["rows"].values()))
    head = ["", "devices", "mesh", "tokens a step", "context", "GiB a chip", "GB sent", "ms: work + waiting"]
    head += ["needed FLOPs", "predicted MFU"]
    return f"Compiled on {about['machine']}, jax {about['jax']}, {about['date']}.\n\n{table(head, rows)}"
