"""The portable form, which CPU gets."""

from .reference import forward

__all__ = ["forward"]
