"""The heads of a mixer: how large each is, and the width split into them and merged again."""

from jax import Array


def head_size(name: str, total: int | float, heads: int) -> int:
    """Divide `total`, called `name` in errors, among the heads; ValueError unless they divide it."""
    if heads < 1 or total < 1 or total % heads:
        raise ValueError(f"heads: got {heads}; expected a number >= 1 that divides {name} = {total:g}")
    return int(total) // heads


def split_heads(x: Array, heads: int) -> Array:
    """[B, T, H * D] -> [B, T, H, D]."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
