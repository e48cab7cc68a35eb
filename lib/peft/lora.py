"""LoRA and QLoRA: matrices stay, packed or not, and a product of two thin ones is trained beside each."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Key

from ..formats import QuantizedTensor
from ..kernels.common.arguments import accumulator
from ..layers.modules.dense import Dense, QuantizedDense, split_columns
from ..optim.common.matrix_spec import leaf_path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A change of a matrix W [..., m, n]: W becomes W + scale * a @ b. A pytree of `a` and `b`.

    Attributes:
      a: [..., m, rank].
      b: [..., rank, n].
      scale: alpha / rank; static, so it isn't trained.
    """

    a: Any  # arrays, or their places in a tree of shardings, shapes or Nones
    b: Any
    scale: float = dataclasses.field(metadata=dict(static=True))

    @property
    def product(self) -> Array:
        """scale * a @ b [..., m, n], in float32 (float64 if `a` is)."""
        wide = accumulator(self.a.dtype)
        return self.scale * jnp.matmul(self.a.astype(wide), self.b.astype(wide), precision="highest")


Adapters = Mapping[str, LowRank]
_DENSE = (Dense, QuantizedDense, nn.Dense)  # layers that multiply their one argument by a kernel [m, n]


def lora_init(
    key: Key[Array, ""],
    params: Any,
    *,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    dtype: DTypeLike | None = None,
) -> dict[str, LowRank]:
    """Adapters for the targeted leaves of `params`, which change nothing yet.

    W becomes W + alpha / rank * a @ b. `a` is normal with variance 1 / m (unit gain), `b` is zero. To train
    the adapters alone, give the optimizer the adapters alone.

    Args:
      key: PRNG key for `a`.
      params: any tree. Arrays and packed leaves (`QuantizedTensor`) [..., m, n] can be targets (m inputs, n
        outputs). Axes before the last two, as `nn.scan` and experts add them, are batch axes: each matrix
        gets a pair of its own.
      targets: ends of paths, in whole parts: "mixer/out" names the leaf ".../mixer/out" or the kernel
        ".../mixer/out/kernel".
      rank: columns of `a`, at most the shorter side of every target.
      alpha: None means `rank`, a scale of 1.
      dtype: of the pairs; None means the leaf's, and float32 by a packed leaf.

    Returns:
      {path of the leaf: its pair}. Paths are written "layers/block_0/mixer/out/kernel".

    Raises:
      ValueError: a target matches no leaf, or the rank exceeds a leaf's shorter side.

    Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Dettmers et al. 2023, QLoRA (2305.14314).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer, x = frugax.layers.Mamba(state_size=4), jnp.ones((1, 7, 16))
        >>> variables = mixer.init(jax.random.key(0), x)
        >>> adapters = frugax.peft.lora_init(
        ...     jax.random.key(1), variables["params"], targets=("in_gate", "dt_B_C"), rank=2
        ... )
        >>> {path: (pair.a.shape, pair.b.shape) for path, pair in adapters.items()}
        {'dt_B_C/kernel': ((32, 2), (2, 9)), 'in_gate/kernel': ((16, 2), (2, 64))}
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}; expected at least 1")
    found = _find(params, targets)
    adapters = {}
    for one, (path, leaf) in zip(jax.random.split(key, len(found)), found.items(), strict=True):
        own = jnp.dtype(jnp.float32) if isinstance(leaf, QuantizedTensor) else leaf.dtype
        if leaf.ndim < 2 or not jnp.issubdtype(own, jnp.floating):
            got = f"{path} is {own}{list(leaf.shape)}"
            raise ValueError(f"targets: {got}; expected a floating dtype and shape [..., in, out]")
        *batch, m, n = leaf.shape
        if rank > min(m, n):
            expected = f"1 to {min(m, n)} for {path} of shape {list(leaf.shape)}"
            raise ValueError(f"rank: got {rank}; expected {expected}")
        a = (jax.random.normal(one, (*batch, m, rank)) / math.sqrt(m)).astype(dtype or own)
        b = jnp.zeros((*batch, rank, n), dtype or own)
        adapters[path] = LowRank(a, b, 1.0 if alpha is None else alpha / rank)
    return adapters


def lora_count(adapters: Adapters) -> int:
    """Count the trained parameters: rank * (m + n) for each matrix.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> params = {"out": {"kernel": jnp.ones((3, 8, 4))}}
        >>> frugax.peft.lora_count(
        ...     frugax.peft.lora_init(jax.random.key(0), params, targets=("out",), rank=2)
        ... )
        72
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(dict(adapters)))


def lora_merge(params: Any, adapters: Adapters) -> Any:
    """Replace each adapted W by W + scale * a @ b, in W's dtype: inference then costs what it did before.

    In place of a packed W comes a float32 array: `frugax.quant.quantize_params` packs it again.

    Differentiable, so adapters of leaves that `lora_apply` can't serve can be trained through it. That costs
    a gradient of W's size.

    Args:
      params: the tree that the adapters are for.
      adapters: from `lora_init`.

    Raises:
      ValueError: `params` have no leaf for an adapter, or one of another shape.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> params = {"out": {"kernel": jnp.ones((8, 4))}}
        >>> adapters = frugax.peft.lora_init(jax.random.key(0), params, targets=("out",), rank=2)
        >>> bool((frugax.peft.lora_merge(params, adapters)["out"]["kernel"] == 1).all())
        True
    """
    return _add(params, adapters, 1)


def lora_unmerge(params: Any, adapters: Adapters) -> Any:
    """Undo `lora_merge`, up to the rounding of a sum and a difference in W's dtype.

    Args:
      params: the result of `lora_merge`.
      adapters: those that were merged.

    Raises:
      ValueError: as `lora_merge`; or W is packed.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> params = {"out": {"kernel": jnp.ones((8, 4))}}
        >>> adapters = frugax.peft.lora_init(jax.random.key(0), params, targets=("out",), rank=2)
        >>> merged = frugax.peft.lora_merge(params, adapters)
        >>> bool((frugax.peft.lora_unmerge(merged, adapters)["out"]["kernel"] == 1).all())
        True
    """
    return _add(params, adapters, -1)


def lora_apply(module: nn.Module, variables: Mapping[str, Any], adapters: Adapters, *args, **kwargs) -> Any:
    """Run `module.apply(variables, ...)` with scale * (x a) b added to the output of each adapted layer.

    W and its adapter are never summed: no gradient of W is computed, and a change that is small beside W
    isn't lost in rounding. A packed W stays packed, in the backward pass too.

    Args:
      module: a Flax Linen module.
      variables: {"params": ...} and the module's other collections.
      adapters: for kernels of `frugax.layers.Dense` and `flax.linen.Dense`. Adapters of layers that `nn.scan`
        stacks are sliced with the params.
      args, kwargs: as for `module.apply`.

    Returns:
      What `module.apply` returns.

    Raises:
      ValueError: an adapter's leaf isn't the kernel of a `Dense` that this call runs.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer, x = frugax.layers.Mamba(state_size=4), jnp.ones((1, 7, 16))
        >>> variables = mixer.init(jax.random.key(0), x)
        >>> adapters = frugax.peft.lora_init(
        ...     jax.random.key(1), variables["params"], targets=("in_gate",), rank=2
        ... )
        >>> loss = lambda adapters: jnp.sum(frugax.peft.lora_apply(mixer, variables, adapters, x)[0] ** 2)
        >>> jax.grad(loss)(adapters)["in_gate/kernel"].b.shape
        (2, 64)
    """
    _check(variables["params"], adapters)
    leaves = flatten_dict(variables["params"], sep="/")
    unused = dict.fromkeys(adapters)
    for path, pair in adapters.items():
        if path.rpartition("/")[2] == "kernel":
            layer = path.removesuffix("kernel")
            leaves |= {f"{layer}lora_a": pair.a, f"{layer}lora_b": pair.scale * pair.b}

    def with_adapter(layer_call: Callable, layer_args, layer_kwargs, context):
        y = layer_call(*layer_args, **layer_kwargs)
        layer = context.module
        if not isinstance(layer, _DENSE) or not layer.has_variable("params", "lora_a"):
            return y
        unused.pop("/".join((*layer.path, "kernel")), None)
        a: Array = layer.get_variable("params", "lora_a")
        b: Array = layer.get_variable("params", "lora_b")
        dtype = jax.tree.leaves(y)[0].dtype
        more = jnp.matmul(layer_args[0].astype(dtype), a.astype(dtype)) @ b.astype(dtype)
        parts = getattr(layer, "parts", None)  # several matrices side by side, and a product of each
        return y + more if parts is None else list(map(jnp.add, y, split_columns(more, parts)))

    with nn.intercept_methods(with_adapter):
        out = module.apply({**variables, "params": unflatten_dict(leaves, sep="/")}, *args, **kwargs)
    if unused:
        raise ValueError(
            f"adapters: got {', '.join(unused)}; expected kernels of Dense layers that this call runs "
            "(lora_merge serves any leaf)"
        )
    return out


def _leaves(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
    return {leaf_path(path): leaf for path, leaf in leaves}


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def _find(params: Any, targets: Sequence[str]) -> dict[str, Any]:
    """Find the leaves that the targets name, in the tree's order; ValueError if a target names none."""
    leaves = _leaves(params)

    def names(target: str, path: str) -> bool:
        return any(f"/{p}".endswith(f"/{target}") for p in (path, path.removesuffix("/kernel")))

    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets: got {targets!r}; expected a tuple of at least one end of a path")
    for target in targets:
        if not any(names(target, path) for path in leaves):
            raise ValueError(
                f"targets: {target!r} matches no leaf; expected the end of one of {', '.join(leaves)}"
            )
    return {path: leaf for path, leaf in leaves.items() if any(names(t, path) for t in targets)}


def _check(params: Any, adapters: Adapters) -> None:
    leaves = _leaves(params)
    for path, pair in adapters.items():
        if path not in leaves:
            raise ValueError(f"adapters: got {path!r}; expected one of {', '.join(leaves)}")
        shape = leaves[path].shape
        if (*pair.a.shape[:-1], pair.b.shape[-1]) != shape or pair.a.shape[-1] != pair.b.shape[-2]:
            got = f"a {list(pair.a.shape)} and b {list(pair.b.shape)}"
            expected = f"[..., {shape[-2]}, r] and [..., r, {shape[-1]}]"
            raise ValueError(f"adapters: got {got} for {path} of shape {list(shape)}; expected {expected}")


def _add(params: Any, adapters: Adapters, sign: int) -> Any:
    _check(params, adapters)

    def add(path, leaf):
        pair = adapters.get(leaf_path(path))
        if pair is None:
            return leaf
        wide = pair.product
        if _is_packed(leaf):
            if sign < 0:
                raise ValueError(f"params: {leaf_path(path)} is packed; expected what lora_merge returned")
            return leaf.dequantize(wide.dtype) + wide
        return (leaf.astype(wide.dtype) + sign * wide).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, params, is_leaf=_is_packed)
