"""Low-bit products in Flax modules: for one dense layer, or for all that a module holds."""

import functools
import math
import re
from typing import Any

from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax import Array

from .dot import AmaxHistory, init_history, low_bit_dot
from .recipe import Recipe, recipe_named


class LowBitDotGeneral(nn.Module):
    """`low_bit_dot` for `flax.linen.Dense(dot_general_cls=...)`.

    The key comes from the stream "low_bit", if there is one. With delayed scaling the history is in
    the collection "_overwrite_with_gradient", where flax's `TrainState` takes its gradient for the next one.

    Attributes:
      recipe: what is rounded, and how; a `Recipe` or its name.

    Raises:
      ValueError: other axes are contracted than the last ones of x and the first ones of w.

    Example:
        >>> import functools, frugax, jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> cls = functools.partial(frugax.quant.training.LowBitDotGeneral, recipe="fp8_delayed")
        >>> variables = nn.Dense(8, dot_general_cls=cls).init(jax.random.key(0), jnp.ones((4, 16)))
        >>> sorted(variables)
        ['_overwrite_with_gradient', 'params']
    """

    recipe: Recipe | str = "nvfp4"

    @nn.compact
    def __call__(self, x: Array, w: Array, dimension_numbers: Any, precision: Any = None, **_: Any) -> Array:
        (of_x, of_w), batch = dimension_numbers
        n = len(of_w)
        if tuple(of_x) != tuple(range(x.ndim - n, x.ndim)) or tuple(of_w) != tuple(range(n)) or any(batch):
            raise ValueError(
                f"dimension_numbers: got {dimension_numbers}; expected the last axes of x with the first of w"
            )
        recipe = recipe_named(self.recipe)
        history = None
        if recipe.history:
            names = AmaxHistory._fields
            history = AmaxHistory(
                *(
                    self.variable(OVERWRITE_WITH_GRADIENT, name, lambda: init_history(recipe).x).value
                    for name in names
                )
            )
        key = self.make_rng("low_bit") if self.has_rng("low_bit") else None
        contracted = math.prod(w.shape[:n])
        y = low_bit_dot(
            x.reshape(*x.shape[: x.ndim - n], contracted),
            w.reshape(contracted, -1),
            recipe,
            key=key,
            history=history,
        )
        return y.reshape(*x.shape[: x.ndim - n], *w.shape[n:])


class LowBit(nn.Module):
    """A module whose dense layers train in few bits: called as the module is, with the module's params.

    Dense layers are those with a `dot_general_cls`: flax's and ours. Embeddings, heads that are no dense
    layers, norms, convolutions and recurrences stay as they are. Call it with rngs={"low_bit": key}, a fresh
    key at every step, to train; to evaluate, it needs none.

    Attributes:
      module: any Flax module.
      recipe: what is rounded, and how; a `Recipe` or its name.
      where: a regular expression: paths of the layers that train in few bits, such as "channel/".

    Raises:
      ValueError: no dense layer's path matches.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.layers.Decoder(vocab_size=10, width=16)
        >>> low = frugax.quant.training.LowBit(model, "nvfp4")
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> variables = low.init(jax.random.key(0), tokens)  # params have the names that they have in `model`
        >>> logits, state = low.apply(variables, tokens, rngs={"low_bit": jax.random.key(1)})
        >>> exact, _ = model.apply(variables, tokens)
        >>> bool((exact != logits).any())
        True
    """

    module: nn.Module
    recipe: Recipe | str = "nvfp4"
    where: str = ""

    def setup(self):
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recipe_named(self.recipe)
        low = functools.partial(LowBitDotGeneral, self.recipe, name="low_bit")
        found = 0

        def in_few_bits(call, args, kwargs, context):
            nonlocal found
            layer = context.module
            if hasattr(layer, "dot_general_cls") and re.search(self.where, "/".join(layer.path)):
                found += 1
                object.__setattr__(layer, "dot_general_cls", low)  # of this call's own copy
            return call(*args, **kwargs)

        with nn.intercept_methods(in_few_bits):
            out = self.module(*args, **kwargs)
        if not found:
            raise ValueError(
                f"where: got {self.where!r} for {type(self.module).__name__}; expected the path of a dense "
                "layer"
            )
        return out
