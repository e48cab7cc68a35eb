"""The generated parts of README.md and docs/: which function makes which."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .. import planning
from ..sentences import five_numbers, what_runs_where, what_steps_take, where_it_loses
from . import compiled, cpu, experts, formats, memory, optimizers, papers, parallel, training

ROOT = Path(__file__).parents[3]
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "families": papers.family_rows,
        "what_runs_where": what_runs_where,
        "five_numbers": five_numbers,
        "where_it_loses": where_it_loses,
    },
    "docs/papers.md": {"papers": papers.every_paper},
    "docs/how-to/memory.md": {"policies": memory.policies, "memory": memory.memory},
    "docs/how-to/parallel.md": {
        "collective_matmul": parallel.collective_matmul,
        "tensor_messages": parallel.tensor_messages,
    },
    "docs/operations/linear_attention.md": {"taylor_memory": compiled.taylor_memory},
    "docs/results/cpu.md": {
        "kept_memory_cpu": cpu.kept_memory_cpu,
        "linear_attention_cpu": cpu.linear_attention_cpu,
        "length_cpu": cpu.length_cpu,
        "recurrences_cpu": cpu.recurrences_cpu,
        "rnn_cpu": cpu.rnn_cpu,
        "quantized_matmul_cpu": cpu.quantized_matmul_cpu,
        "grouped_matmul_cpu": cpu.grouped_matmul_cpu,
        "mamba_cpu": cpu.mamba_cpu,
    },
    "docs/results/training.md": {
        "training": training.training,
        "classification": training.classification,
        "qlora": training.qlora,
        "mamba_lyapunov": training.mamba_lyapunov,
        "low_bit_training": training.low_bit_training,
        "parallel_block": training.parallel_block,
        "recall": training.recall,
    },
    "docs/results/experts.md": {
        "moe_routers": experts.moe_routers,
        "expert_placement": experts.expert_placement,
        "m3vit_digits": experts.m3vit_digits,
        "read_me": experts.read_me,
        "memory_bank": experts.memory_bank,
    },
    "docs/results/planning.md": {
        "memory_estimators": planning.memory_estimators,
        "memory_peaks": planning.memory_peaks,
        "frontier_terms": planning.frontier_terms,
        "frontier_trends": planning.frontier_trends,
        "frontier_best": planning.frontier_best,
        "attention_balance": planning.attention_balance,
        "groups_of_degrees": planning.groups_of_degrees,
        "pods": planning.pods,
    },
    "docs/results/formats.md": {
        "formats": formats.formats,
        "minifloats": formats.minifloats,
        "bipolar": formats.bipolar,
        "minilm": formats.minilm,
        "minifloat_digits": formats.minifloat_digits,
        "low_bit": formats.low_bit,
        "qmoe": formats.qmoe,
    },
    "docs/results/optimizers.md": {
        "optimizers_quality": optimizers.optimizers_quality,
        "optimizer_steps": optimizers.optimizer_steps,
        "what_steps_take": what_steps_take,
        "layerwise_memory": optimizers.layerwise_memory,
        "mezo_finetune": optimizers.mezo_finetune,
        "zo_queries": optimizers.zo_queries,
    },
    "docs/results/compiled.md": {
        "tpu_linear_attention": partial(compiled.tpu_schedule, "linear_attention"),
        "tpu_selective_scan": partial(compiled.tpu_schedule, "selective_scan"),
        "tpu_rnn": partial(compiled.tpu_schedule, "rnn"),
        "tpu_quantized_update": partial(compiled.tpu_schedule, "quantized_update"),
        "tpu_quantized_matmul": partial(compiled.tpu_schedule, "quantized_matmul"),
        "tpu_grouped_matmul": compiled.tpu_grouped_matmul,
        "hopper_linear_attention": partial(compiled.hopper, "linear_attention"),
        "hopper_selective_scan": partial(compiled.hopper, "selective_scan"),
        "hopper_rnn": partial(compiled.hopper, "rnn"),
        "hopper_adam_8bit": partial(compiled.hopper, "adam_8bit"),
        "hopper_quantized_matmul": partial(compiled.hopper, "quantized_matmul"),
        "hopper_grouped_matmul": partial(compiled.hopper, "grouped_matmul"),
    },
}


def rewritten(page: str) -> str:
    """Make everything between `<!-- table NAME -->` and `<!-- end -->` of a page anew; return the text."""
    text = (ROOT / page).read_text()
    for name, make in PAGES[page].items():
        start, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{page}: got no place for the table {name}; expected {start.strip()}")
        old, found, after = rest.partition(end)
        if not found or "<!-- table" in old:
            raise SystemExit(f"{page}: got no end of the table {name}; expected {end} after it")
        text = before + start + make() + "\n" + end + after
    return text
