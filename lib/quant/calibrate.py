"""Statistics of the inputs of every matrix of a Flax module, gathered in bounded memory."""

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import core
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array, lax

from ..formats import QuantizedTensor
from ..optim.common.matrix_spec import leaf_path
from .statistics import Statistics

Quantizer = Callable[[str, Array, Statistics], QuantizedTensor | Array]

_NAME = "frugax_statistics"
_TURN = "frugax_turn"  # true in the layer of a stack that has its turn


def calibrate(
    module: nn.Module,
    variables: Any,
    batches: Iterable[Any],
    *,
    only: str = "",
    max_bytes: int | None = None,
    quantize: Quantizer | None = None,
    together: str = r".*block_\d+|[^/]+",
    **kwargs: Any,
) -> dict[str, Statistics]:
    """Gather the statistics of the inputs of each matrix of a module.

    The matrices are the `kernel`s of `nn.Dense`, of `nn.DenseGeneral` over the last axes, and of any other
    module with a kernel [K, N] that multiplies its input [..., K]; under `nn.scan` and `nn.vmap` too, such as
    the layers of a `Decoder`, whose statistics are stacked as its params are. Those of the kernels [E, K, N]
    of `MoE`'s experts are stacked too: each expert's are of the tokens that it was sent. A parameter that is
    multiplied outside such a module, as an embedding or a head, is not among them.

    Args:
      module: any Flax Linen module.
      variables: what `module.apply` takes.
      batches: what the module is called with, again and again: an array, or a tuple of arguments.
      only: a regular expression; the matrices with it in their path alone.
      max_bytes: of Gram matrices on the device at once. What does not fit waits for another pass over the
        batches, so that they must be a list or another container; a matrix that is larger by itself has a
        pass of its own. None: one pass.
      quantize: (path, matrix, its statistics) -> the matrix quantized. Given it, the inputs of a block are
        those that it has once all blocks before it are quantized so, as in GPTQ: one pass over the batches
        for each block, and each layer of a stack, where None is one for all. Of a stack it is handed one
        layer's matrix and statistics.
      together: with `quantize`, a regular expression: matrices in a row, at the start of whose paths it
        finds the same, make a block, and see each other's inputs as they were. Blocks in a row, in one module
        and with as many layers, make a stack, whose layers are taken in turn. "": a whole layer of a stack.
      kwargs: further arguments of each call, such as `deterministic=True`.

    Returns:
      {path: statistics} in the order of the calls, such as "layers/block_0/channel/out/kernel"; NumPy arrays.

    Raises:
      ValueError: no matrix found; no batches; inputs that are not finite; a module whose params don't differ
        from step to step of a scan inside.

    Warns:
      UserWarning: fewer inputs than channels, so that damping decides about part of the Hessian.

    Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323); Lin et al. 2023, AWQ (arXiv 2306.00978).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2})
        >>> model = frugax.layers.Decoder(vocab_size=10, width=16, blocks=(block,), repeats=3)
        >>> batches = [jax.random.randint(jax.random.key(i), (4, 16), 0, 10) for i in range(2)]
        >>> variables = model.init(jax.random.key(0), batches[0])
        >>> found = frugax.quant.calibrate(model, variables, batches, only="channel")
        >>> list(found)
        ['layers/block_0/channel/gate_in/kernel', 'layers/block_0/channel/out/kernel']
        >>> found["layers/block_0/channel/out/kernel"].gram.shape
        (3, 48, 48)

        With `quantize`, layer by layer, each after those before it:

        >>> def pack(path, w, statistics):
        ...     return frugax.quant.gptq(w, statistics, "int4")
        >>> after = frugax.quant.calibrate(model, variables, batches, only="channel", quantize=pack)
        >>> path = "layers/block_0/channel/out/kernel"
        >>> bool((after[path].gram[0] == found[path].gram[0]).all())  # nothing is before the first
        True
        >>> packed, _ = frugax.quant.quantize_params(
        ...     variables["params"], {"channel/.*kernel$": lambda path, w: pack(path, w, after[path])}
        ... )
    """
    once = iter(batches) is batches
    batches = iter(batches) if once else batches
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches: got none; expected at least one")

    order: dict[str, bool] = {}

    def call(variables, batch, wanted, layer=None):
        if layer is not None:
            variables = _with_turn(variables, {path: (shapes[path], order[path]) for path in wanted}, layer)
        args = batch if isinstance(batch, tuple) else (batch,)
        found, of_experts = _gathered(module, variables, args, kwargs, wanted)
        order.update(of_experts)  # in the order of the calls: JAX sorts a dict that it returns
        return found

    # Shapes alone: which matrices there are, and how large.
    pattern = re.compile(only)
    shapes = jax.eval_shape(lambda variables: call(variables, first, None), variables)
    shapes = {path: shapes[path] for path in order if pattern.search(path)}
    if not shapes:
        raise ValueError(f"module: found no matrix with {only!r} in its path; expected modules with a kernel")
    sizes = {path: s.gram.size * 4 for path, s in shapes.items()}
    stages = [Stage(tuple(shapes))]
    if quantize is not None:
        variables = nn.meta.unbox(variables)
        stages = list(_stages({path: _depth(s, order[path]) for path, s in shapes.items()}, together))
    passes = [_passes({path: sizes[path] for path in stage.paths}, max_bytes) for stage in stages]
    count = sum(map(len, passes))
    if once and count > 1:
        why = f"within max_bytes={max_bytes}" if quantize is None else "with quantize"
        raise ValueError(f"batches: got an iterator for {count} passes {why}; expected a list")

    @functools.cache
    def adding(wanted: frozenset[str]):
        @jax.jit
        def add(total, variables, batch, layer):
            new = call(variables, batch, wanted, layer)
            if layer is not None:
                new = jax.tree.map(lambda x: x[layer], new)
            return {path: total[path].merge(new[path]) for path in total}

        return add

    def gather(variables, wanted: tuple[str, ...], layer: int | None) -> dict[str, Statistics]:
        """Pass over the batches, for one layer of a stack or for all."""
        add, own = adding(frozenset(wanted)), slice(None if layer is None else 1, None)
        turn = None if layer is None else jnp.int32(layer)
        total = {
            path: jax.tree.map(lambda s: jnp.zeros(s.shape[own], s.dtype), shapes[path]) for path in wanted
        }
        if once:
            total = add(total, variables, first, turn)
        for batch in batches:
            total = add(total, variables, batch, turn)
        return jax.tree.map(np.asarray, total)

    found: dict[str, Statistics] = {}
    for stage, parts in zip(stages, passes, strict=True):
        new = {path: s for wanted in parts for path, s in gather(variables, wanted, stage.layer).items()}
        for path, s in new.items():
            if stage.layer is None:
                found[path] = s
            elif stage.layer == 0:
                found[path] = jax.tree.map(lambda x: x[None], s)
            else:
                found[path] = jax.tree.map(lambda x, y: np.concatenate([x, y[None]]), found[path], s)
            if quantize is not None and stage is not stages[-1]:
                variables = _with_quantized(variables, path, stage.layer, s, quantize)
    found = {path: found[path] for path in shapes}
    _say_what_is_wrong(found)
    return found


class MatrixInput(NamedTuple):
    """An input of a matrix: its kernel's path, the input as [..., K], and of experts the rows of each."""

    path: str
    x: Array
    group_sizes: Array | None = None


def matrix_input(context: nn.module.InterceptorContext, args: tuple[Any, ...]) -> MatrixInput | None:
    """The input of the matrix that an intercepted call multiplies by, or None where it does not."""
    module = context.module
    if context.method_name != "__call__" or not args or not module.has_variable("params", "kernel"):
        return None
    kernel, x = nn.meta.unbox(module.get_variable("params", "kernel")), args[0]
    if not hasattr(x, "shape") or not hasattr(kernel, "shape"):
        return None
    axes = 1
    if isinstance(module, nn.DenseGeneral):
        given = module.axis if isinstance(module.axis, tuple) else (module.axis,)
        axes = len(given)
        if tuple(a % x.ndim for a in given) != tuple(range(x.ndim - axes, x.ndim)) or module.batch_dims:
            return None
    elif isinstance(module, nn.Conv) or len(kernel.shape) != 2:
        return None
    if x.ndim < axes or x.shape[x.ndim - axes :] != tuple(kernel.shape[:axes]):
        return None
    x = jnp.asarray(x)
    return MatrixInput("/".join((*module.path, "kernel")), x.reshape(*x.shape[: x.ndim - axes], -1))


def expert_inputs(context: nn.module.InterceptorContext, args: tuple[Any, ...]) -> MatrixInput | None:
    """The rows that stacked experts are about to multiply, or None for another call than `reads`."""
    if context.method_name != "reads" or not context.module.has_variable("params", "kernel"):
        return None
    x, group_sizes = args
    return MatrixInput("/".join((*context.module.path, "kernel")), jnp.asarray(x), group_sizes)


def _gathered(
    module, variables, args, kwargs, wanted: frozenset[str] | None
) -> tuple[dict[str, Statistics], dict[str, bool]]:
    """The statistics of one call, of the matrices wanted (None: of all), and which are those of experts.

    They are written beside each kernel among the params, which a scan over layers carries out stacked as it
    carried the kernels in.
    """
    order: dict[str, bool] = {}

    def see(call, args, kwargs, context):
        found = matrix_input(context, args) or expert_inputs(context, args)
        inner = context.module
        if found and (wanted is None or found.path in wanted) and inner.is_mutable_collection("params"):
            turn = inner.get_variable("params", _TURN)
            new = _statistics(found) if turn is None else _if_it_is(turn, found)
            if inner.has_variable("params", _NAME):
                new = inner.get_variable("params", _NAME).merge(new)
            inner.put_variable("params", _NAME, new)
            order.setdefault(found.path, found.group_sizes is not None)
        return call(*args, **kwargs)

    try:
        with nn.intercept_methods(see):
            _, after = module.apply(variables, *args, mutable=["params"], **kwargs)
    except ValueError as error:
        if "broadcasted variable" not in str(error):
            raise
        raise ValueError(
            f"module: got {type(module).__name__}, a scan inside of which has the same params in each step; "
            "expected one over layers, each with its own"
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(
        after.get("params", {}), is_leaf=lambda x: isinstance(x, Statistics)
    )
    found = {
        "/".join((*(str(key.key) for key in path[:-1]), "kernel")): x
        for path, x in leaves
        if isinstance(x, Statistics)
    }
    return {path: found[path] for path in order}, order


def _statistics(found: MatrixInput) -> Statistics:
    sizes = found.group_sizes
    return Statistics.of(found.x) if sizes is None else Statistics.of_groups(found.x, sizes)


def _if_it_is(turn: Array, found: MatrixInput) -> Statistics:
    """The statistics in the layer that has its turn; zeros, without the work, in all others."""
    path, *arrays = found

    def zeros(*arrays):
        shapes = jax.eval_shape(lambda *arrays: _statistics(MatrixInput(path, *arrays)), *arrays)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return lax.cond(turn, lambda *arrays: _statistics(MatrixInput(path, *arrays)), zeros, *arrays)


class Stage(NamedTuple):
    """Matrices whose statistics are taken together, of one layer of a stack or of all."""

    paths: tuple[str, ...]
    layer: int | None = None


def _depth(shape: Statistics, is_of_experts: bool) -> int | None:
    """The layers of a stack of matrices, None for a single one; experts are no layers."""
    return shape.gram.shape[0] if shape.gram.ndim > 2 + is_of_experts else None


def _stages(depths: dict[str, int | None], together: str) -> Iterator[Stage]:
    """The blocks of a model in the order in which an input meets them; those of a scan layer by layer."""

    def block(path: str) -> str:
        found = re.match(together, path)
        return "" if found is None else found.group()

    def stack(path: str) -> tuple[str, str, int | None]:
        return path.split("/")[0], block(path).rpartition("/")[0], depths[path]

    for (*_, depth), scan in itertools.groupby(depths, stack):
        blocks = [tuple(paths) for _, paths in itertools.groupby(scan, block)]
        for layer in (None,) if depth is None else range(depth):
            yield from (Stage(paths, layer) for paths in blocks)


def _with_quantized(
    variables: Any, name: str, layer: int | None, statistics: Statistics, quantize: Quantizer
) -> Any:
    """The variables with a matrix, or one layer of a stack, in the values that it has once quantized."""

    def put(path, leaf):
        if leaf_path(path) != name or isinstance(leaf, QuantizedTensor):
            return leaf
        q = quantize(name, leaf if layer is None else leaf[layer], statistics)
        value = (q.dequantize(leaf.dtype) if isinstance(q, QuantizedTensor) else q).astype(leaf.dtype)
        return value if layer is None else leaf.at[layer].set(value)

    params = jax.tree_util.tree_map_with_path(
        put, variables["params"], is_leaf=lambda x: isinstance(x, QuantizedTensor)
    )
    return {**variables, "params": params}


def _with_turn(variables: Any, wanted: dict[str, tuple[Statistics, bool]], layer: Array) -> Any:
    """The variables with a mark beside each stacked kernel, true in one layer."""
    params = flatten_dict(core.unfreeze(variables["params"]), keep_empty_nodes=True, sep="/")
    for path, (shape, is_of_experts) in wanted.items():
        stacked = shape.count.shape[: -1 if is_of_experts else None]
        turn = jnp.arange(stacked[0], dtype=jnp.int32) == layer
        turn = jnp.broadcast_to(turn.reshape(-1, *(1,) * (len(stacked) - 1)), stacked)
        params[path.removesuffix("kernel") + _TURN] = turn
    return {**variables, "params": unflatten_dict(params, sep="/")}


def _passes(sizes: dict[str, int], max_bytes: int | None) -> list[tuple[str, ...]]:
    """Cut the matrices in runs of at most `max_bytes`, of at least one matrix each."""
    passes: list[list[str]] = []
    room = -1.0
    for path, size in sizes.items():
        if size > room or not passes:
            passes.append([])
            room = float("inf") if max_bytes is None else max_bytes
        passes[-1].append(path)
        room -= size
    return [tuple(paths) for paths in passes]


def _say_what_is_wrong(found: dict[str, Statistics]) -> None:
    for path, statistics in found.items():
        if not np.isfinite(statistics.gram).all():
            raise ValueError(f"batches: got inputs of {path} that are not finite or whose squares are not")
    few = [path for path, s in found.items() if np.any(s.count < s.gram.shape[-1])]
    if few:
        worst = max(few, key=lambda path: found[path].gram.shape[-1])
        count, K = int(np.min(found[worst].count)), found[worst].gram.shape[-1]
        warnings.warn(
            f"{count} inputs for the {K} channels of {worst} (and {len(few) - 1} more matrices with fewer "
            "inputs than channels): damping decides about the rest of their Hessians",
            stacklevel=3,
        )
