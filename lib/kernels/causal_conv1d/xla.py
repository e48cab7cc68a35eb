"""The portable form: W shifted multiply-adds, which XLA fuses into one loop."""

from .reference import forward as forward
