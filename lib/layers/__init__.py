"""Flax Linen modules: sequence mixers, channel mixers, norms, and the decoder they are assembled into.

Every sequence mixer has one call, `mixer(x, *, state=None, segment_ids=None) -> (y, state)`: training passes
no state, chunked prefill passes one, and decoding is the same call with T == 1.
"""

import importlib
from typing import Any

from flax.linen import LayerNorm

from ..kernels.linear_attention.features import taylor
from .bidirectional import Bidirectional
from .block import Block
from .channel.decoupled_router import DecoupledRouter
from .channel.memory_glu import MemoryGLU
from .channel.mlp import GLU, MLP
from .channel.moe import MoE
from .channel.rwkv_channel import RWKVChannel
from .mixers.based import Based, based_blocks
from .mixers.flash_rnn import FlashRNN
from .mixers.gated_convolution import GatedConvolution
from .mixers.gated_linear_attention import GatedLinearAttention
from .mixers.hgrn2 import HGRN2
from .mixers.lightning_attention import LightningAttention, decay_slopes, transnormer_block
from .mixers.linear_attention import LinearAttention
from .mixers.lmu import LMU
from .mixers.mamba import Mamba
from .mixers.mamba2 import Mamba2
from .mixers.mixer import Mixer
from .mixers.mlgru import MLGRU
from .mixers.retention import Retention
from .mixers.rwkv5 import RWKV5
from .mixers.rwkv6 import RWKV6
from .mixers.sliding_window import SlidingWindowAttention
from .modules.bit_linear import BitLinear
from .modules.dense import Dense, QuantizedDense
from .modules.depthwise_conv import DepthwiseConv
from .modules.feature_maps import LearnedMap, elu_plus_one
from .modules.norms import GatedNorm, HeadLayerNorm, RMSNorm, SimpleRMSNorm
from .modules.rotary import positions, rotary
from .modules.short_conv import ShortConv
from .modules.spiking import lif, spike
from .modules.stable_embedding import StableEmbedding
from .vision.blocks import EVSS, VSS, InvertedResidual, SqueezeExcite
from .vision.selective_scan_2d import SelectiveScan2D

__all__ = [
    "EVSS",
    "GLU",
    "HGRN2",
    "LMU",
    "MLGRU",
    "MLP",
    "RWKV5",
    "RWKV6",
    "VSS",
    "Based",
    "Bidirectional",
    "BitLinear",
    "Block",
    "ConvEmbedding",
    "Decoder",
    "DecoderState",
    "DecoupledRouter",
    "Dense",
    "DepthwiseConv",
    "FlashRNN",
    "GatedConvolution",
    "GatedLinearAttention",
    "GatedNorm",
    "HeadLayerNorm",
    "InvertedResidual",
    "LMUFormer",
    "LayerNorm",
    "LearnedMap",
    "LightningAttention",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "MemoryGLU",
    "Mixer",
    "MoE",
    "QuantizedDense",
    "RMSNorm",
    "RWKVChannel",
    "Retention",
    "SelectiveScan2D",
    "ShortConv",
    "SimpleRMSNorm",
    "SlidingWindowAttention",
    "SqueezeExcite",
    "StableEmbedding",
    "VisionMamba",
    "based_blocks",
    "decay_slopes",
    "elu_plus_one",
    "lif",
    "positions",
    "rotary",
    "spike",
    "taylor",
    "transnormer_block",
]

# Models stand on layers, so these names of theirs are loaded only when asked for.
_MODELS = ("ConvEmbedding", "Decoder", "DecoderState", "LMUFormer", "VisionMamba", "pretrained")


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(importlib.import_module("..models", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
