"""Adapters over any tree of params: few numbers to train beside many that stay."""

from .lora import LowRank, lora_apply, lora_count, lora_init, lora_merge, lora_unmerge

__all__ = ["LowRank", "lora_apply", "lora_count", "lora_init", "lora_merge", "lora_unmerge"]
