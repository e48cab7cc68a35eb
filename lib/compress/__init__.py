"""Compression of weights: codes without loss, below one bit a weight."""

from .dictionary import CompressedTernary, compress_ternary
from .dictionary_matmul import dictionary_matmul

__all__ = ["CompressedTernary", "compress_ternary", "dictionary_matmul"]
