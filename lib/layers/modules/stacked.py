"""The collections that scans over depth stack and split for each layer."""

from typing import Any

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

# Arguments of `nn.scan`. Beside params: fetched memories (`MemoryGLU`); the histories and keys of low-bit
# training (frugax.quant.training); what `MoE` reports, carries from step to step, and draws.
STACKED: dict[str, Any] = {
    "variable_axes": {"params": 0, "memory": 0, OVERWRITE_WITH_GRADIENT: 0, "moe": 0, "router_state": 0},
    "split_rngs": {"params": True, "low_bit": True, "router": True},
}
