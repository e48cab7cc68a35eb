"""Which inputs need more bits: by layer, as FlexQ chooses, or by channel, as COMET does."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ..formats import Format, fake_quantize, format_named
from .calibrate import matrix_input
from .statistics import Statistics


def activation_sensitivity(
    loss: Callable[[Any, Any], Array],
    variables: Any,
    batches: Iterable[Any],
    *,
    format: Format | str = "int6",
    group_size: int | None = 128,
) -> dict[str, float]:
    """Measure by how much the loss grows where the inputs of one matrix, and of no other, are in few bits.

    Args:
      loss: a scalar of (variables, batch), which calls the `apply` of a Flax Linen module.
      variables: its variables; their weights may be quantized already.
      batches: what the loss is averaged over.
      format: of the inputs of one matrix at a time; each token's are rounded in groups of channels.
      group_size: channels that share a scale; None: all of a token's.

    Returns:
      {path of the kernel: mean increase of the loss}, with the paths of `calibrate`. A matrix that is stacked
      over depth is one matrix: the same in every layer.

    Raises:
      ValueError: no matrix found, or no batches.

    Source: Zhang et al. 2025, FlexQ (arXiv 2508.04405), where each kind of linear layer is judged by itself.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(8)])
        >>> x = jax.random.normal(jax.random.key(0), (32, 8)).at[:, 0].multiply(100)  # an outlier
        >>> variables = model.init(jax.random.key(1), x)
        >>> want = model.apply(variables, x)
        >>> loss = lambda variables, x: ((model.apply(variables, x) - want) ** 2).mean()
        >>> found = frugax.quant.activation_sensitivity(loss, variables, [x])
        >>> found["layers_0/kernel"] > 10 * found["layers_2/kernel"]
        True
    """
    format = format_named(format)
    batches = list(batches)
    if not batches:
        raise ValueError("batches: got none; expected at least one")
    paths: dict[str, int] = {}

    def measured(variables, batch, chosen):
        def rounded(call, args, kwargs, context):
            found = matrix_input(context, args)
            if found is None:
                return call(*args, **kwargs)
            place = paths.setdefault(found.path, len(paths))
            if chosen is not None:
                few = fake_quantize(found.x, format, axis=-1, group_size=group_size).reshape(args[0].shape)
                args = (jnp.where(chosen == place, few.astype(args[0].dtype), args[0]), *args[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(rounded):
            return loss(variables, batch)

    jax.eval_shape(lambda variables: measured(variables, batches[0], None), variables)
    if not paths:
        raise ValueError("loss: found no matrix in it; expected modules with a kernel")
    # One program for all: which matrix is in few bits is an argument, and -1 is none.
    run = jax.jit(measured)
    total = np.zeros(len(paths) + 1)
    for batch in batches:
        total += [float(run(variables, batch, i)) for i in range(-1, len(paths))]
    increase = (total[1:] - total[0]) / len(batches)
    return dict(zip(paths, increase.tolist(), strict=True))


def sensitive_layers(increases: Mapping[str, float], *, share: float = 0.5) -> tuple[str, ...]:
    """Choose the fewest layers that carry `share` of all increase in loss: those whose inputs keep 8 bits.

    Args:
      increases: what `activation_sensitivity` returns; one that is not positive counts as none.
      share: 0 (no layer) to 1 (all with an increase).

    Returns:
      Paths, the most sensitive first.

    Raises:
      ValueError: a share outside 0 to 1, or an increase that is NaN.

    Source: Zhang et al. 2025, FlexQ (arXiv 2508.04405): 8 bits stay where 6 hurt most, which in Llama is the
    last projection of each channel mixer.

    Example:
        >>> import frugax
        >>> frugax.quant.sensitive_layers({"q": 0.01, "gate_in": 0.02, "out": 0.3}, share=0.8)
        ('out',)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}; expected 0 to 1")
    if any(np.isnan(x) for x in increases.values()):
        raise ValueError(f"increases: got NaN for {[k for k, x in increases.items() if np.isnan(x)]}")
    ranked = sorted(increases, key=lambda path: -increases[path])
    ranked = [path for path in ranked if increases[path] > 0]
    wanted, carried = share * sum(increases[path] for path in ranked) * (1 - 1e-9), 0.0
    chosen = []
    for path in ranked:
        if carried >= wanted:
            break
        chosen.append(path)
        carried += increases[path]
    return tuple(chosen)


def outlier_permutation(
    statistics: Statistics, *, block: int = 128, ratio: float = 8.0
) -> tuple[np.ndarray, int]:
    """Find an order of channels in which those with outliers fill the first blocks.

    Args:
      statistics: of a matrix' inputs; of one matrix, not of stacked ones.
      block: channels of a block, as in `frugax.kernels.MixedActivations`.
      ratio: a channel has outliers where its largest magnitude is so many times the channels' median.

    Returns:
      order: int32 [K], largest first; x[..., order] @ w[order] is x @ w.
      high_blocks: how many blocks it takes to hold all channels with outliers.

    Raises:
      ValueError: statistics of stacked matrices.

    Source: Liu et al. 2024, COMET (arXiv 2410.12168), section 3.2.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> statistics = frugax.quant.Statistics.of(jnp.array([[1.0, -1.0, 90.0, 2.0, 1.0, 1.0]]))
        >>> order, high_blocks = frugax.quant.outlier_permutation(statistics, block=2)
        >>> order.tolist(), high_blocks
        ([2, 3, 0, 1, 4, 5], 1)
    """
    largest = np.asarray(statistics.max_abs)
    if largest.ndim != 1:
        raise ValueError(f"statistics.max_abs: got {list(largest.shape)}; expected [K], of one matrix")
    if block < 1:
        raise ValueError(f"block: got {block}; expected at least 1")
    order = np.argsort(-largest, kind="stable").astype(np.int32)
    outliers = int(np.sum(largest > ratio * np.median(largest)))
    return order, -(-outliers // block)
