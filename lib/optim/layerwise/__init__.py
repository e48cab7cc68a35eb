"""Optimizers of some layers at a time; `compressed` has functions of few bits for the blocks of a model."""

from . import compressed

__all__ = ["compressed"]
