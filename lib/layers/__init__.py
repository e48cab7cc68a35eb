"""Flax Linen modules: sequence mixers, channel mixers, norms, and the decoder they are assembled into.

Every sequence mixer has one call, `mixer(x, *, state=None, segment_ids=None) -> (y, state)`: training passes
no state, chunked prefill passes one, and decoding is the same call with T == 1.
"""

from flax.linen import LayerNorm

from .based import Based
from .block import Block
from .channel import GLU, MLP
from .decoder import Decoder, DecoderState
from .feature_maps import LearnedMap, elu_plus_one, taylor
from .gated_convolution import GatedConvolution
from .gated_linear_attention import GatedLinearAttention
from .hgrn2 import HGRN2
from .lightning_attention import LightningAttention, decay_slopes, transnormer_block
from .linear_attention import LinearAttention
from .mixer import Mixer
from .mlgru import MLGRU
from .norms import GatedNorm, HeadLayerNorm, RMSNorm, SimpleRMSNorm
from .retention import Retention
from .rotary import positions, rotary
from .rwkv6 import RWKV6
from .short_conv import ShortConv
from .sliding_window import SlidingWindowAttention

__all__ = [
    "GLU",
    "HGRN2",
    "MLGRU",
    "MLP",
    "RWKV6",
    "Based",
    "Block",
    "Decoder",
    "DecoderState",
    "GatedConvolution",
    "GatedLinearAttention",
    "GatedNorm",
    "HeadLayerNorm",
    "LayerNorm",
    "LearnedMap",
    "LightningAttention",
    "LinearAttention",
    "Mixer",
    "RMSNorm",
    "Retention",
    "ShortConv",
    "SimpleRMSNorm",
    "SlidingWindowAttention",
    "decay_slopes",
    "elu_plus_one",
    "positions",
    "rotary",
    "taylor",
    "transnormer_block",
]
