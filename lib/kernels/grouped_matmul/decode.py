"""One packed expert back to values."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..common.arguments import pad_to
from ..quantized_matmul import inputs as packed
from ..quantized_matmul.decode import block_of, groups, unpack_rows, values
from .inputs import PACKED, Inputs, Spec


def stored(call: Inputs) -> dict[str, Array]:
    """The arrays of packed experts that the call has, by name."""
    return {name: x for name in PACKED if (x := getattr(call, name)) is not None}


def expert(stored: dict[str, Any], spec: Spec) -> tuple[packed.Inputs, packed.Spec]:
    """One expert's arrays by name as a call of `quantized_matmul` without tokens, for its decoders."""
    assert spec.format is not None
    of_one = packed.Spec(spec.format, spec.group_size, spec.K, None, "dot")
    return packed.Inputs(**dict.fromkeys(packed.Inputs._fields) | stored), of_one


def decoded(stored: dict[str, Any], spec: Spec, dtype: jnp.dtype) -> Array:
    """One expert [K, N] of its arrays by name; codes times scales are products in `dtype`."""
    call, of_one = expert(stored, spec)
    assert spec.format is not None
    codes = unpack_rows(call.codes, spec.format, block_of(of_one, call.codes.shape[0]))[: spec.K]
    found = groups(call, of_one)
    G, N = found.scales.shape
    codes = pad_to(codes, (G * spec.group_size, N)).reshape(G, spec.group_size, N)
    value, scales = values(codes, found, spec.format)
    return (value.astype(dtype) * scales[:, None].astype(dtype)).reshape(-1, N)[: spec.K]
