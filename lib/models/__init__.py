"""Models assembled from the layers: the decoder, classifiers, and converters of pretrained checkpoints."""

from . import pretrained as pretrained
from .decoder import Decoder, DecoderState
from .lmuformer import ConvEmbedding, LMUFormer

__all__ = ["ConvEmbedding", "Decoder", "DecoderState", "LMUFormer", "pretrained"]
