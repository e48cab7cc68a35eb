"""A recipe of low-bit training: what is rounded, and how, a point of the design space, as a value."""

import dataclasses

from ...formats import AbsMax, Element, Minifloat, PowerOfTwo, RoundedAbsMax, format_named

SCALES: dict[str, AbsMax | PowerOfTwo | RoundedAbsMax] = {
    "e8m0": PowerOfTwo("floor"),  # as OCP MX has it: elements may saturate
    "e4m3": RoundedAbsMax(Minifloat.of(4, 3, reserved=1, signed=False)),
    "ue5m3": RoundedAbsMax(Minifloat.of(5, 3, reserved=1, signed=False)),
    "float32": AbsMax(),
}
ROUNDING_GRADIENTS = ("straight_through", "power", "spline")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which numbers the three matrix products of a linear layer see. Frozen and hashable.

    Attributes:
      forward: the element format of activations and weights, or its name; None leaves them as they are.
      gradient: that of the output's gradient. None: the backward products see it as it is, beside the
        activations and weights that the forward product saw.
      block_size: elements along the contracted axis that share a scale; None: one scale for the tensor.
      scale: the format of scales: "e8m0" (powers of two), "e4m3" and "ue5m3" (unsigned), or "float32".
      tensor_scale: a float32 scale for each tensor, which brings its largest block scale to the top of
        `scale`'s range ("e8m0": to 1).
      hadamard: turn blocks of both operands by the same random Hadamard matrix before they are rounded.
      stochastic: round the output's gradient at random, so that it is right on average. Its scales are then
        rounded up: an element that saturates would be wrong on average.
      rounding_gradient: the derivative of rounding, of operands in the forward product: 1
        ("straight_through"), or that of a curve through the rounding's steps ("power", "spline").
      scale_gradient: also differentiate the scale, which is the largest magnitude of its block.
      history: of how many steps the largest magnitudes give a tensor's scale ("delayed scaling"); 0: this
        step's own. Needs `block_size=None`.

    Raises:
      ValueError: naming the attribute that can't be right.

    Source: Hu et al. 2025, Elucidating the Design Space of FP4 training (arXiv 2509.17791); Micikevicius et
    al. 2022, FP8 Formats for Deep Learning (2209.05433), for `block_size=None` and `history`.

    Example:
        >>> import frugax
        >>> frugax.quant.training.Recipe(scale="ue5m3", block_size=16).forward
        'fp4_e2m1'
    """

    forward: Element | str | None = "fp4_e2m1"
    gradient: Element | str | None = "fp4_e2m1"
    block_size: int | None = 32
    scale: str = "e8m0"
    tensor_scale: bool = False
    hadamard: bool = False
    stochastic: bool = True
    rounding_gradient: str = "straight_through"
    scale_gradient: bool = False
    history: int = 0

    def __post_init__(self):
        def check(name: str, right: bool, expected: str) -> None:
            if not right:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {expected}")

        for name in ("forward", "gradient"):
            of = element(getattr(self, name))
            check(name, of is None or of.signed, "an element format with negative values, or None")
        b = self.block_size
        check("block_size", b is None or b >= 1, "a number >= 1, or None")
        check("scale", self.scale in SCALES, "one of " + ", ".join(SCALES))
        expected = "one of " + ", ".join(ROUNDING_GRADIENTS)
        check("rounding_gradient", self.rounding_gradient in ROUNDING_GRADIENTS, expected)
        check("history", self.history >= 0, "a number >= 0")
        check(
            "tensor_scale", not (self.tensor_scale and self.scale == "float32"), "False beside float32 scales"
        )
        if b is None:
            check("scale", self.scale == "float32", "'float32' where block_size is None")
            check("hadamard", not self.hadamard, "False where block_size is None")
        else:
            check("history", self.history == 0, "0 unless block_size is None")
            check("block_size", not self.hadamard or b & (b - 1) == 0, "a power of two for hadamard")
        check("scale_gradient", not (self.scale_gradient and self.history), "False beside a history")


def element(format: Element | str | None) -> Element | None:
    """The element format of this name."""
    return format_named(format).element if isinstance(format, str) else format


RECIPES = {
    "mxfp4": Recipe(hadamard=True),
    "nvfp4": Recipe(block_size=16, scale="e4m3", tensor_scale=True, hadamard=True),
    "ue5m3_fp4": Recipe(scale="ue5m3", tensor_scale=True, hadamard=True),
    "fp8_current": Recipe("fp8_e4m3", "fp8_e5m2", None, "float32", stochastic=False),
    "fp8_delayed": Recipe("fp8_e4m3", "fp8_e5m2", None, "float32", stochastic=False, history=1024),
}


def recipe_named(recipe: Recipe | str) -> Recipe:
    """Look up a recipe by its name; a recipe is returned as it is.

    Args:
      recipe: "mxfp4" (Tseng et al. 2025, arXiv 2502.20586), "nvfp4" (NVIDIA 2025, 2509.25149), "ue5m3_fp4",
        "fp8_current" or "fp8_delayed" (e4m3 forward, e5m2 for gradients), or any `Recipe`.

    Raises:
      ValueError: no recipe has this name.

    Example:
        >>> import frugax
        >>> frugax.quant.training.recipe_named("nvfp4").block_size
        16
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe: got {recipe!r}; expected a Recipe or one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
