"""Tables of docs/results/optimizers.md: quality, time and memory of optimizers."""

from ..markdown import BY_TURNS, plain_caption, read, table


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


def layerwise_memory() -> str:
    result = read("layerwise_memory")
    rows = [
        [name, f"{r['temporaries'] / 1e6:.1f}", f"{r['state'] / 1e6:.1f}"]
        for name, r in result["rows"].items()
    ]
    about = f"{result['model']}, {result['parameters']:,} parameters"
    return f"{about}. {plain_caption(result)}\n\n{table(['', 'temporaries MB', 'state MB'], rows)}"


def mezo_finetune() -> str:
    result, rows = read("mezo_finetune"), []
    for name, r in result["rows"].items():
        sizes = [r[key] / 1e6 for key in ("state_bytes", "step_temporaries", "inference_temporaries")]
        loss = f"{r['loss_before']:.3f} to {r['loss']:.3f}"
        rows.append([name, r["steps"], loss, f"{100 * r['accuracy']:.0f}", *(f"{x:.1f}" for x in sizes)])
    head = ["", "steps", "loss", "accuracy, %", "state MB", "step's temporaries MB", "a forward pass's"]
    about = f"{result['task']}, {result['parameters']:,} parameters"
    return f"{about}. {plain_caption(result)}\n\n{table(head, rows)}"


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
