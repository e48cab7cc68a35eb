"""Low-bit training: matrix products that see few bits, forward and backward, simulated on any device."""

from .dot import AmaxHistory, init_history, low_bit_dot
from .layer import LowBit, LowBitDotGeneral
from .quantizer import Quantized, quantize_blocks, quantizer_vjp
from .recipe import RECIPES, Recipe, recipe_named

__all__ = [
    "RECIPES",
    "AmaxHistory",
    "LowBit",
    "LowBitDotGeneral",
    "Quantized",
    "Recipe",
    "init_history",
    "low_bit_dot",
    "quantize_blocks",
    "quantizer_vjp",
    "recipe_named",
]
