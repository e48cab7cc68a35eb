"""Memory of training by formulas over layers: params, gradients, optimizer state and kept activations."""

from collections.abc import Iterable
from typing import NamedTuple


class Layer(NamedTuple):
    """Elements that a layer holds.

    Attributes:
      params: of its weights.
      inputs: of its input, for one example.
      kept: of what its backward pass needs, for one example, its input among it.
    """

    params: int
    inputs: int
    kept: int


class TrainingBytes(NamedTuple):
    """Bytes of a training step by kind; `total` adds them up."""

    params: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def training_bytes(
    layers: Iterable[Layer],
    *,
    batch: int,
    moments: int = 2,
    param_itemsize: int = 4,
    moment_itemsize: int = 4,
    activation_itemsize: int = 4,
    rematerialize: bool = False,
) -> TrainingBytes:
    """Add up what a training step holds, from its layers alone.

    Args:
      layers: in any order.
      batch: examples of a step, or of a microbatch.
      moments: numbers that the optimizer keeps for each param: 2 for Adam, 1 for momentum, 0 for SGD.
      param_itemsize: bytes of a param and of its gradient.
      moment_itemsize: bytes of one moment.
      activation_itemsize: bytes of an activation.
      rematerialize: keep only the layers' inputs, and compute the rest again, one layer at a time.

    Returns:
      The bytes by kind.

    Raises:
      ValueError: a number is below its least.

    Source: the form of Horus, as in GPU Memory and Utilization Estimation for Training-Aware Resource
    Management, 2026 (arXiv 2602.17817): weights, gradients, states, and outputs of layers times the batch.

    Example:
        >>> import frugax
        >>> found = frugax.planner.training_bytes([frugax.planner.dense(8, 4)], batch=10)
        >>> found.params, found.optimizer, found.total
        (144, 288, 1056)
    """
    layers = list(layers)
    for name, value, least in (("batch", batch, 1), ("moments", moments, 0)):
        if value < least:
            raise ValueError(f"{name}: got {value}; expected at least {least}")
    params = sum(layer.params for layer in layers)
    if rematerialize:
        kept = sum(layer.inputs for layer in layers) + max((layer.kept for layer in layers), default=0)
    else:
        kept = sum(layer.kept for layer in layers)
    return TrainingBytes(
        params * param_itemsize,
        params * param_itemsize,
        params * moments * moment_itemsize,
        batch * kept * activation_itemsize,
    )


def dense(inputs: int, outputs: int) -> Layer:
    """Count a dense layer with a bias and an activation function, which keeps its argument.

    Example:
        >>> import frugax
        >>> frugax.planner.dense(8, 4)
        Layer(params=36, inputs=8, kept=12)
    """
    return Layer(inputs * outputs + outputs, inputs, inputs + outputs)


def convolution(size: int, inputs: int, outputs: int, *, window: int = 3) -> Layer:
    """Count a convolution over size x size places, with a bias and an activation function.

    Example:
        >>> import frugax
        >>> frugax.planner.convolution(8, 3, 16)
        Layer(params=448, inputs=192, kept=1216)
    """
    places = size * size
    return Layer(window**2 * inputs * outputs + outputs, places * inputs, places * (inputs + outputs))


def transformer_block(width: int, *, time: int, heads: int, hidden: int | None = None) -> Layer:
    """Count a block of softmax attention and an MLP, each behind a norm, whose scores are stored.

    A token keeps both norms' inputs and outputs, queries, keys, values, the heads' sums, the hidden units
    before and after their activation function, and a row of attention weights for each head.

    Args:
      width: of the residual stream.
      time: tokens of an example.
      heads: of the attention.
      hidden: units of the MLP; None: 4 times the width.

    Source: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models
    (arXiv 2205.05198), without dropout.

    Example:
        >>> import frugax
        >>> frugax.planner.transformer_block(64, time=32, heads=4).kept
        36864
    """
    hidden = 4 * width if hidden is None else hidden
    kept = 8 * width + 2 * hidden + heads * time  # of a token
    return Layer(4 * width**2 + 2 * width * hidden, time * width, time * kept)
