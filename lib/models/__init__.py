"""Models assembled from the layers: the decoder, classifiers, and converters of pretrained checkpoints."""

from . import pretrained as pretrained
from .decoder import Decoder, DecoderState
from .lmuformer import ConvEmbedding, LMUFormer
from .m3vit import M3ViT
from .stages import Stages, decoder_stages
from .vision_mamba import VisionMamba

__all__ = [
    "ConvEmbedding",
    "Decoder",
    "DecoderState",
    "LMUFormer",
    "M3ViT",
    "Stages",
    "VisionMamba",
    "decoder_stages",
    "pretrained",
]
