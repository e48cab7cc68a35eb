"""Mixture of experts: routers, the way of tokens to experts and back."""

from .dispatch import DispatchPlan, combine, dispatch
from .losses import activation_locality, chunk_sparsity, load_balance, squared_variation, z_loss
from .residency import Prefetched, cache_hits, expert_batches, prefetch
from .routers import (
    SoftRouting,
    base,
    expert_choice,
    hash_route,
    noisy_top_k,
    relu_route,
    route,
    sigmoid_top_k,
    sinkhorn_top_k,
    soft_route,
    softmax_top_k,
    updated_bias,
)
from .routing import Routing, RoutingStatistics
from .selection import auction, sinkhorn

__all__ = [
    "DispatchPlan",
    "Prefetched",
    "Routing",
    "RoutingStatistics",
    "SoftRouting",
    "activation_locality",
    "auction",
    "base",
    "cache_hits",
    "chunk_sparsity",
    "combine",
    "dispatch",
    "expert_batches",
    "expert_choice",
    "hash_route",
    "load_balance",
    "noisy_top_k",
    "prefetch",
    "relu_route",
    "route",
    "sigmoid_top_k",
    "sinkhorn",
    "sinkhorn_top_k",
    "soft_route",
    "softmax_top_k",
    "squared_variation",
    "updated_bias",
    "z_loss",
]
