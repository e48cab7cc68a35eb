"""Experts stacked on a leading axis, applied to tokens in the order of experts, in slots, or all of them."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..compress import CompressedTernary, dictionary_matmul
from ..formats import QuantizedTensor, fake_quantize
from ..kernels import grouped_matmul, quantized_matmul
from ..kernels.common.arguments import accumulator
from ..kernels.common.operation import Backend
from .dispatch import by_expert
from .routing import Routing

Kernel = Array | QuantizedTensor | CompressedTernary
Kernels = Mapping[str, Kernel]
Activation = Callable[[Array], Array]


def apply_experts(
    x: Float[Array, "... d"],
    kernels: Kernels,
    group_sizes: Int[Array, "e"] | None = None,
    *,
    activation: Activation = jax.nn.silu,
    ternary: bool = False,
    observe: Callable[[str, Array], None] | None = None,
    backend: Backend | None = None,
) -> Float[Array, "... n"]:
    """Apply to each row its expert: W_out (activation(W_gate x) * W_in x), or W_out activation(W_in x).

    Args:
      x: rows [M, D] in the order of experts, with `group_sizes`; or slots [E, C, D].
      kernels: of E experts, arrays or packed: {"gate_in": [E, D, 2 H], "out": [E, H, N]} for gated ones,
        where the gate's columns stand first, or {"in": [E, D, H], "out": [E, H, N]}.
      group_sizes: rows of each expert. Rows past their sum give zeros.
      activation: an elementwise function.
      ternary: round kernels to -1, 0 and 1 times their mean magnitude, and each row to 8 bits, before each
        product; gradients pass straight through (BitNet b1.58, without its norm). Of packed kernels only
        the rows are rounded.
      observe: called with each kernel's name and what it is about to multiply, for calibration.
      backend: handed to `frugax.kernels`; None picks by platform.

    Returns:
      [M, N] or [E, C, N] in x's dtype.

    Raises:
      ValueError: the kernels are not those of such experts, or x has not their width.

    Source: Shazeer 2020 (arXiv 2002.05202) for gated units; Ma et al. 2024, BitNet b1.58 (2402.17764), and
    Wang et al. 2025, MoTE (2506.14435), for ternary experts.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> kernels = {"in": jnp.ones((2, 3, 4)), "out": jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])}
        >>> how = {"activation": jax.nn.relu}
        >>> y = frugax.moe.apply_experts(jnp.ones((3, 3)), kernels, jnp.array([1, 2]), **how)
        >>> y.tolist()
        [[12.0, 12.0, 12.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    first = _check(x, kernels)

    def times(x, name):
        x, w = _operands(x, kernels[name], ternary)
        if observe is not None:
            observe(name, x)
        if isinstance(w, CompressedTernary):
            return dictionary_matmul(x, w, group_sizes)
        if group_sizes is not None:
            return grouped_matmul(x, w, group_sizes, backend=backend)
        if isinstance(w, QuantizedTensor):
            return jax.vmap(lambda x, w: quantized_matmul(x, w, backend=backend))(x, w)
        y = jnp.einsum("ecd,edh->ech", x, w, preferred_element_type=accumulator(x.dtype))
        return y.astype(x.dtype)

    return times(_activated(times(x, first), first, activation), "out")


def routed_experts(
    x: Float[Array, "t d"],
    routing: Routing,
    kernels: Mapping[str, Array | QuantizedTensor],
    *,
    activation: Activation = jax.nn.silu,
    ternary: bool = False,
    backend: Backend | None = None,
) -> Float[Array, "t n"]:
    """Apply to each token the experts that it was routed to, and add them up by weight; none is dropped.

    The same as `dispatch`, `apply_experts` and `combine`, but no sorted copy of the tokens is made where
    products can read their rows one by one, and add them up.

    Args:
      x: tokens.
      routing: from a router.
      kernels: of all experts, arrays or packed, as in `apply_experts`.
      activation, ternary, backend: as there.

    Returns:
      [T, N] in x's dtype. Weights meet the hidden units, in float32.

    Raises:
      ValueError: the kernels are not those of the routed experts, or x has not their width or the routed
        tokens.

    Source: Tan et al. 2024, ScatterMoE (arXiv 2403.08245).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x, kernels = jnp.array([[1.0], [2.0]]), {"in": jnp.ones((2, 1, 1)), "out": jnp.ones((2, 1, 1))}
        >>> routing = frugax.moe.softmax_top_k(jnp.array([[9.0, 0.0], [0.0, 9.0]]), 1)
        >>> frugax.moe.routed_experts(x, routing, kernels, activation=jax.nn.relu).tolist()
        [[1.0], [2.0]]
    """
    first, wide = _check(x, kernels), accumulator(x.dtype)
    T = x.shape[0]
    if routing.by == "token" and routing.indices.shape[0] != T:
        raise ValueError(
            f"x: got {list(x.shape)}; expected the {routing.indices.shape[0]} tokens that were routed"
        )
    if kernels["out"].shape[0] != routing.experts:
        raise ValueError(
            f"kernels: got {kernels['out'].shape[0]} experts; expected the {routing.experts} of routing"
        )
    order, inverse, sizes = by_expert(routing)
    tokens, _, weights = routing.assignments()
    token = tokens[order]
    rows_of = inverse.reshape(routing.indices.shape) if routing.by == "token" else None
    product = functools.partial(grouped_matmul, group_sizes=sizes, rows_of=rows_of, backend=backend)

    h = _activated(product(*_operands(x, kernels[first], ternary), gather=token), first, activation)
    h, out = _operands(h, kernels["out"], ternary)
    # After rounding: a weight's gradient is of what is multiplied.
    h = (h.astype(wide) * weights[order].astype(wide)[:, None]).astype(x.dtype)
    return product(h, out, scatter=token, out_rows=T)


def dense_experts(
    x: Float[Array, "t d"],
    weights: Float[Array, "t e"],
    kernels: Kernels,
    *,
    activation: Activation = jax.nn.silu,
    ternary: bool = False,
) -> Float[Array, "t n"]:
    """Apply every expert to every token, and add them up by weight: the definition of a mixture.

    Args:
      x: tokens.
      weights: of each token's experts; 0 where an expert has no part.
      kernels, activation, ternary: as in `apply_experts`.

    Returns:
      [T, N] in x's dtype, summed in float32.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> kernels = {"in": jnp.ones((2, 1, 1)), "out": jnp.array([[[1.0]], [[10.0]]])}
        >>> how = {"activation": jax.nn.relu}
        >>> frugax.moe.dense_experts(jnp.ones((1, 1)), jnp.array([[0.5, 0.25]]), kernels, **how).tolist()
        [[3.0]]
    """
    first, wide = _check(x, kernels), accumulator(x.dtype)

    def operands(x, name):
        x, w = _operands(x, kernels[name], ternary)
        if isinstance(w, CompressedTernary):
            w = w.decode(x.dtype)
        elif isinstance(w, QuantizedTensor):
            w = w.dequantize(x.dtype)
        return x, w

    h = jnp.einsum("td,edh->teh", *operands(x, first), preferred_element_type=wide).astype(x.dtype)
    h, out = operands(_activated(h, first, activation), "out")
    h = h.astype(wide) * weights[..., None].astype(wide)
    return jnp.einsum("teh,ehd->td", h, out.astype(wide)).astype(x.dtype)


def sparse_reglu(
    x: Float[Array, "d"],
    indices: Int[Array, "k"],
    weights: Float[Array, "k"],
    kernels: Mapping[str, Array],
    *,
    block: int = 64,
) -> Float[Array, "n"]:
    """Apply a token's ReGLU experts, and read only the neurons that their gates activate.

    The gates' columns are read whole; of the values' columns and the rows of "out" only those of neurons with
    a positive gate, `block` at a time. For decoding: it has no reverse-mode gradient.

    Args:
      x: one token.
      indices: its experts.
      weights: of them.
      kernels: arrays of gated experts, as in `apply_experts`.
      block: neurons that are fetched together.

    Returns:
      The weighted sum [N] in x's dtype, as of `dense_experts` with `jax.nn.relu`.

    Raises:
      ValueError: the kernels are not of gated experts, or x has not their width.

    Source: SmallThinker (arXiv 2507.20984), after Song et al. 2024, PowerInfer (2312.12456).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> gate_in, out = jnp.array([[[1.0, -1.0, 5.0, 7.0]]]), jnp.array([[[1.0], [100.0]]])
        >>> kernels = {"gate_in": gate_in, "out": out}
        >>> frugax.moe.sparse_reglu(jnp.ones(1), jnp.array([0]), jnp.ones(1), kernels).tolist()
        [5.0]
    """
    if _check(x, kernels) != "gate_in":
        raise ValueError(f"kernels: got {sorted(kernels)}; expected gate_in and out")
    if block < 1:
        raise ValueError(f"block: got {block}; expected a number of neurons >= 1")
    gate_in, out = (kernels[name].astype(x.dtype) for name in ("gate_in", "out"))
    H, wide = out.shape[1], accumulator(x.dtype)

    def add(total, expert):
        e, weight = expert
        gates = jax.nn.relu(jnp.dot(x, gate_in[e, :, :H], preferred_element_type=wide))
        active = gates != 0  # NaN too
        count = jnp.sum(active, dtype=jnp.int32)
        order = jnp.pad(jnp.argsort(~active, stable=True), (0, -H % block))

        def some(i, y):
            here = jax.lax.dynamic_slice(order, (i * block,), (block,))
            here = jnp.where(i * block + jnp.arange(block) < count, here, H)  # past the end: read as zeros
            columns = gate_in.at[e, :, H + here].get(mode="fill", fill_value=0)
            rows = out.at[e, here].get(mode="fill", fill_value=0)
            h = gates.at[here].get(mode="fill", fill_value=0)
            h = h * jnp.dot(columns, x, preferred_element_type=wide)
            return y + jnp.dot(h, rows.astype(wide), precision="highest")

        y = jax.lax.fori_loop(0, (count + block - 1) // block, some, jnp.zeros_like(total))
        return total + weight.astype(wide) * y, None

    return jax.lax.scan(add, jnp.zeros(out.shape[2], wide), (indices, weights))[0].astype(x.dtype)


def _check(x: Array, kernels: Kernels) -> str:
    """The name of the experts' first kernel; ValueError where kernels or x can't be right."""
    first = next((name for name in ("gate_in", "in") if name in kernels), None)
    if first is None or "out" not in kernels:
        raise ValueError(f"kernels: got {sorted(kernels)}; expected gate_in and out, or in and out")
    into, out = kernels[first].shape, kernels["out"].shape
    hidden = into[-1] // 2 if first == "gate_in" else into[-1]
    if len(into) != 3 or len(out) != 3 or out[:2] != (into[0], hidden):
        raise ValueError(
            f"kernels: got {first} {list(into)} and out {list(out)}; expected [E, D, "
            f"{'2 H' if first == 'gate_in' else 'H'}] and [E, H, N]"
        )
    if x.shape[-1] != into[1]:
        raise ValueError(f"x: got {list(x.shape)}; expected rows of {into[1]}, the experts' width")
    return first


def _operands(x: Array, w: Kernel, ternary: bool) -> tuple[Array, Kernel]:
    """The rows and the experts of a product, rounded where experts are ternary."""
    if not isinstance(w, QuantizedTensor | CompressedTernary):
        w = (fake_quantize(w, "ternary", axis=-2) if ternary else w).astype(x.dtype)
    return (fake_quantize(x, "int8", axis=-1) if ternary else x), w


def _activated(h: Array, first: str, activation: Activation) -> Array:
    if first == "in":
        return activation(h)
    gate, value = jnp.split(h, 2, axis=-1)
    return activation(gate) * value
