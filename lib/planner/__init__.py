"""Plans of training over many devices, made without them: memory, time and the best mesh."""

from .analytic import Layer, TrainingBytes, convolution, dense, training_bytes, transformer_block
from .distca import (
    Balance,
    CoreTask,
    balance_core_attention,
    balanced_order,
    core_attention,
    core_balance,
    sequence_parallel_tasks,
)
from .flexsp import (
    Group,
    SequenceCosts,
    bucket_lengths,
    group_meshes,
    group_seconds,
    plan_groups,
    plan_step,
    split_microbatches,
)
from .flops import Flops, flops
from .hlo import Collective, collectives
from .liveness import Liveness, liveness
from .plan import Plan, mfu, plan
from .search import (
    Cluster,
    Configuration,
    Found,
    Latency,
    Workload,
    configurations,
    device_bytes,
    latency,
    place,
    search,
    transformer_workload,
)
from .topology import Topology, topology

__all__ = [
    "Balance",
    "Cluster",
    "Collective",
    "Configuration",
    "CoreTask",
    "Flops",
    "Found",
    "Group",
    "Latency",
    "Layer",
    "Liveness",
    "Plan",
    "SequenceCosts",
    "Topology",
    "TrainingBytes",
    "Workload",
    "balance_core_attention",
    "balanced_order",
    "bucket_lengths",
    "collectives",
    "configurations",
    "convolution",
    "core_attention",
    "core_balance",
    "dense",
    "device_bytes",
    "flops",
    "group_meshes",
    "group_seconds",
    "latency",
    "liveness",
    "mfu",
    "place",
    "plan",
    "plan_groups",
    "plan_step",
    "search",
    "sequence_parallel_tasks",
    "split_microbatches",
    "topology",
    "training_bytes",
    "transformer_block",
    "transformer_workload",
]
