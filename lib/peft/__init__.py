"""Adapters over any tree of params: few parameters are trained beside many that stay as they are."""

from .lora import LowRank, lora_apply, lora_count, lora_init, lora_merge, lora_unmerge
from .welore import LowRankPart, welore_merge, welore_ranks, welore_split

__all__ = [
    "LowRank",
    "LowRankPart",
    "lora_apply",
    "lora_count",
    "lora_init",
    "lora_merge",
    "lora_unmerge",
    "welore_merge",
    "welore_ranks",
    "welore_split",
]
