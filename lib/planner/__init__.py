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
from .latency import (
    Cluster,
    Configuration,
    Latency,
    Traffic,
    Workload,
    device_bytes,
    latency,
    traffic,
    transformer_workload,
)
from .liveness import Liveness, liveness
from .plan import Plan, mfu, plan
from .search import Found, configurations, place, search
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
    "Traffic",
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
    "traffic",
    "training_bytes",
    "transformer_block",
    "transformer_workload",
]
