"""The portable form, which CPU gets."""

from .reference import forward as forward
