"""Mixture of experts: routers, the way of tokens to experts and back."""

from .adaptive_factor import AdaptiveFactor, FactorState
from .cluster_tree import ClusterTree, cluster_tree, route_document
from .collected import load_summary, total_loss
from .dispatch import DispatchPlan, combine, dispatch
from .expert_major import expert_by_expert
from .experts import apply_experts, dense_experts, routed_experts, sparse_reglu
from .hashing import hash_route
from .losses import activation_locality, chunk_sparsity, load_balance, squared_variation, z_loss
from .memory import (
    distinct_nodes,
    fetch,
    init_nodes,
    memory_bank,
    put_nodes,
    take_nodes,
    update_nodes,
)
from .refactoring import activation_overlap, router_distillation, split_by_activation, split_neurons
from .residency import Prefetched, cache_hits, expert_batches, prefetch
from .resizing import aggregate_experts, prune_experts
from .routers import (
    base,
    expert_choice,
    noisy_top_k,
    relu_route,
    route,
    sigmoid_top_k,
    sinkhorn_top_k,
    softmax_top_k,
    updated_bias,
)
from .routing import Routing, RoutingStatistics
from .selection import auction, sinkhorn
from .soft import SoftRouting, soft_route
from .upcycling import upcycle

__all__ = [
    "AdaptiveFactor",
    "ClusterTree",
    "DispatchPlan",
    "FactorState",
    "Prefetched",
    "Routing",
    "RoutingStatistics",
    "SoftRouting",
    "activation_locality",
    "activation_overlap",
    "aggregate_experts",
    "apply_experts",
    "auction",
    "base",
    "cache_hits",
    "chunk_sparsity",
    "cluster_tree",
    "combine",
    "dense_experts",
    "dispatch",
    "distinct_nodes",
    "expert_batches",
    "expert_by_expert",
    "expert_choice",
    "fetch",
    "hash_route",
    "init_nodes",
    "load_balance",
    "load_summary",
    "memory_bank",
    "noisy_top_k",
    "prefetch",
    "prune_experts",
    "put_nodes",
    "relu_route",
    "route",
    "route_document",
    "routed_experts",
    "router_distillation",
    "sigmoid_top_k",
    "sinkhorn",
    "sinkhorn_top_k",
    "soft_route",
    "softmax_top_k",
    "sparse_reglu",
    "split_by_activation",
    "split_neurons",
    "squared_variation",
    "take_nodes",
    "total_loss",
    "upcycle",
    "update_nodes",
    "updated_bias",
    "z_loss",
]
