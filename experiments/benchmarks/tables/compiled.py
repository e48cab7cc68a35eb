"""Tables of what compilers say of kernels: TPU schedules, Hopper's registers, bytes of temporaries."""

from ..markdown import read, table


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
        rows[-1] += [f"{r['hbm_over_packed']:.3f}x"] if "hbm_over_packed" in r else []
    head = ["kernel", "chip", "cycles", "copies", "floor", "total over floor", "matrix unit", "spills"]
    head += ["HBM over packed"] if any("hbm_over_packed" in r for r in result["rows"]) else []
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
