"""Flax Linen modules: sequence mixers, channel mixers, norms, and the decoder they are assembled into.

Every sequence mixer has one call, `mixer(x, *, state=None, segment_ids=None) -> (y, state)`: training passes
no state, chunked prefill passes one, and decoding is the same call with T == 1.
"""

from flax.linen import LayerNorm

from . import pretrained as pretrained
from .based import Based
from .block import Block
from .channel import GLU, MLP
from .decoder import Decoder, DecoderState
from .depthwise_conv import DepthwiseConv
from .feature_maps import LearnedMap, elu_plus_one, taylor
from .flash_rnn import FlashRNN
from .gated_convolution import GatedConvolution
from .gated_linear_attention import GatedLinearAttention
from .hgrn2 import HGRN2
from .lightning_attention import LightningAttention, decay_slopes, transnormer_block
from .linear_attention import LinearAttention
from .lmu import LMU
from .lmuformer import ConvEmbedding, LMUFormer
from .mamba import Mamba
from .mamba2 import Mamba2
from .mixer import Mixer
from .mlgru import MLGRU
from .norms import GatedNorm, HeadLayerNorm, RMSNorm, SimpleRMSNorm
from .retention import Retention
from .rotary import positions, rotary
from .rwkv6 import RWKV6
from .selective_scan_2d import SelectiveScan2D
from .short_conv import ShortConv
from .sliding_window import SlidingWindowAttention
from .spiking import lif, spike
from .stable_embedding import StableEmbedding
from .vision_mamba import EVSS, VSS, InvertedResidual, SqueezeExcite, VisionMamba

__all__ = [
    "EVSS",
    "GLU",
    "HGRN2",
    "LMU",
    "MLGRU",
    "MLP",
    "RWKV6",
    "VSS",
    "Based",
    "Block",
    "ConvEmbedding",
    "Decoder",
    "DecoderState",
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
    "Mixer",
    "RMSNorm",
    "Retention",
    "SelectiveScan2D",
    "ShortConv",
    "SimpleRMSNorm",
    "SlidingWindowAttention",
    "SqueezeExcite",
    "StableEmbedding",
    "VisionMamba",
    "decay_slopes",
    "elu_plus_one",
    "lif",
    "positions",
    "rotary",
    "spike",
    "taylor",
    "transnormer_block",
]
