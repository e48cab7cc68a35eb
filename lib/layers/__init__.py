"""Flax Linen modules: sequence mixers, channel mixers, norms, and the decoder they are assembled into.

Every sequence mixer has one call, `mixer(x, *, state=None, segment_ids=None) -> (y, state)`: training passes no
state, chunked prefill passes one, and decoding is the same call with T == 1.
"""

from flax.linen import LayerNorm

from .block import Block
from .channel import GLU, MLP
from .decoder import Decoder, DecoderState
from .gated_linear_attention import GatedLinearAttention
from .mixer import Mixer
from .norms import GatedNorm, HeadLayerNorm, RMSNorm, SimpleRMSNorm
from .short_conv import ShortConv

__all__ = [
    "GLU",
    "MLP",
    "Block",
    "Decoder",
    "DecoderState",
    "GatedLinearAttention",
    "GatedNorm",
    "HeadLayerNorm",
    "LayerNorm",
    "Mixer",
    "RMSNorm",
    "ShortConv",
    "SimpleRMSNorm",
]
