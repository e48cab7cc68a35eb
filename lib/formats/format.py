"""A number format: an element format, a scale scheme, and how many elements share a scale."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from .element import Element
from .scales import AbsMax, AbsMean, Scaling, never_zero, spread

ABS_MAX = AbsMax()


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to store a tensor. Values are fixed, so that a format may be a static argument.

    Attributes:
      name: the name that `frugax.formats.quantize` takes.
      element: codes and their values.
      scheme: what is stored for each group of codes, and how it is found.
      group_size: elements that share a scale where the caller does not say; None: the whole axis.

    A format in which a code alone does not say its value overrides `codes`, `values` and `next`, and is not
    `elementwise`; if two neighbours' codes belong together it is `paired`, and encodes even numbers of them.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> mxfp4 = frugax.formats.format_named("mxfp4")
        >>> mxfp4.bits, mxfp4.group_size, mxfp4.element.name
        (4, 32, 'fp4_e2m1')
        >>> scaling = mxfp4.fit(jnp.array([[0.1, -0.9, 0.4]]))  # one group of three
        >>> codes = mxfp4.encode(jnp.array([[0.1, -0.9, 0.4]]), scaling)
        >>> mxfp4.decode(codes, scaling).tolist()
        [[0.125, -1.0, 0.375]]
    """

    name: str
    element: Element
    scheme: Any = ABS_MAX
    group_size: int | None = None
    elementwise = True
    paired = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.element.bits

    @property
    def signed(self) -> bool:
        """True if negative values have codes."""
        return self.element.signed

    def fit(self, x: Array) -> Scaling:
        """Find what is stored for each group of x [..., G, g]: arrays [..., G]."""
        return self.scheme.fit(x.astype(jnp.float32), self.element)

    def covering(self) -> "Format":
        """The format with a scheme that leaves no value out of range, which unbiased rounding needs."""
        return dataclasses.replace(self, scheme=self.scheme.covering())

    def group_of(self, group_size: int | None, n: int) -> int:
        """The elements of a group on an axis of n: `group_size`, or the format's own, or all.

        Raises:
          ValueError: group_size is no integer, below 1, or given where a matrix has one scale.
        """
        if group_size is not None and not (isinstance(group_size, int | np.integer) and group_size >= 1):
            raise ValueError(f"group_size: got {group_size!r}; expected an integer of at least 1, or None")
        if group_size is not None and isinstance(self.scheme, AbsMean):
            raise ValueError(
                f"group_size: got {group_size}; expected None: {self.name} has one scale a matrix"
            )
        return min(group_size or self.group_size or n, n)

    def scale(self, scaling: Scaling) -> Array:
        """The float32 scale of each group."""
        return self.scheme.scale(scaling)

    def encode(self, x: Array, scaling: Scaling, uniform: Array | None = None) -> Array:
        """The int32 codes of x [..., G, g]; rounded at random where uniform values in [0, 1) are given."""
        # Flat: a step of an optimizer that is done in parts then stays one pass over memory.
        flat, scale = x.astype(jnp.float32).reshape(*x.shape[:-2], -1), never_zero(self.scale(scaling))
        unit = (flat / spread(scale, x.shape[-1], flat.shape[-1])).reshape(x.shape)
        if scaling.zeros is not None:
            unit = unit + scaling.zeros.astype(jnp.float32)[..., None]
        return self.codes(unit, scaling, uniform)

    def decode(self, codes: Array, scaling: Scaling, dtype: DTypeLike = jnp.float32) -> Array:
        """The values of codes [..., G, g], multiplied in float32 or a wider dtype."""
        value = self.values(codes, scaling)
        if scaling.zeros is not None:
            value = value - scaling.zeros.astype(jnp.float32)[..., None]
        return value.astype(dtype) * self.scale(scaling).astype(dtype)[..., None]

    def codes(self, unit: Array, scaling: Scaling, uniform: Array | None = None) -> Array:
        """The codes of values [..., G, g] over their scale."""
        if uniform is None:
            return self.element.encode(unit)
        largest, least = self.element.largest, -self.element.largest if self.signed else 0.0
        return self.element.encode_stochastic(jnp.clip(unit, least, largest), uniform)

    def values(self, codes: Array, scaling: Scaling) -> Array:
        """The values of codes [..., G, g], before zeros are subtracted and scales multiplied."""
        return self.element.decode(codes)

    def next(self, codes: Array, up: Array, scaling: Scaling) -> Array:
        """The codes [..., G, g] of the next larger values where `up`, else of the next smaller ones."""
        return self.element.next(codes, up)
