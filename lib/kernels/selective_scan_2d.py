"""Selective scans of images: paths through the pixels, each a sequence of its own for `selective_scan`."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .common.arguments import accumulator, as_shaped, operand_dtype, reject
from .common.operation import Backend
from .selective_scan import selective_scan

Scan = Literal["cross", "atrous"]


def selective_scan_2d(
    x: Float[Array, "b h w d"],
    dt: Float[Array, "paths b t d"],
    A: Float[Array, "paths d n"],
    B: Float[Array, "paths b t n"],
    C: Float[Array, "paths b t n"],
    D: Float[Array, "paths d"] | None = None,
    *,
    scan: Scan = "cross",
    step: int = 2,
    dt_bias: Float[Array, "paths d"] | None = None,
    dt_softplus: bool = False,
    backend: Backend | None = None,
) -> Float[Array, "b h w d"]:
    """Selective scan of an image along several paths, each with its own parameters; a pixel's outputs add up.

    Args:
      x: the image [B, H, W, D].
      dt, B, C: as in `selective_scan`, for each path and each token along it: functions of
        `paths_2d(x, scan=scan, step=step)`.
      A, D, dt_bias: as in `selective_scan`, for each path.
      scan, step: which paths, as in `paths_2d`: "cross", four over the whole image, or "atrous", step * step
        paths over the pixels of one skip-sampled grid each, which cost a quarter of them at step 2.
      dt_softplus, backend: as in `selective_scan`.

    Returns:
      The image of outputs [B, H, W, D] in x's dtype.

    Raises:
      ValueError: naming the argument that can't be right.

    Source: VMamba (Liu et al. 2024, arXiv 2401.10166), SS2D; EfficientVMamba (Pei et al. 2024, arXiv
    2403.09977), ES2D.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (1, 7, 6, 8))
        >>> paths = frugax.kernels.paths_2d(x, scan="atrous")
        >>> B = C = paths[..., :4]
        >>> A = -jnp.ones((4, 8, 4))
        >>> frugax.kernels.selective_scan_2d(x, paths, A, B, C, scan="atrous", dt_softplus=True).shape
        (1, 7, 6, 8)
    """
    dt, A, B, C, D, dt_bias = map(as_shaped, (dt, A, B, C, D, dt_bias))
    paths = paths_2d(x, scan=scan, step=step)
    _check_paths(paths, dt, A, B, C, D, dt_bias)

    def one(x, dt, A, B, C, D, dt_bias):
        x = x.astype(operand_dtype(x.dtype))  # paths add up before they are float16 again
        y, _ = selective_scan(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, backend=backend)
        return y

    y = jax.vmap(one)(paths, dt, A, B, C, D, dt_bias)
    image = merge_paths_2d(y.astype(accumulator(y.dtype)), x.shape[1], x.shape[2], scan=scan, step=step)
    return image.astype(x.dtype)


def _check_paths(paths, dt, A, B, C, D, dt_bias) -> None:
    """Raise ValueError unless every path has its arrays, and of tokens as many as it visits."""
    for name, array in dict(dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias).items():
        if array is not None and array.shape[:1] != paths.shape[:1]:
            reject(name, array, f"a first axis of {len(paths)}, one for each path")
    for name, array in dict(dt=dt, B=B, C=C).items():
        if array.shape[:-1] != paths.shape[:-1]:
            reject(name, array, f"{list(paths.shape[:-1])} and its channels (paths, batch, tokens)")


def paths_2d(
    x: Float[Array, "b h w d"], *, scan: Scan = "cross", step: int = 2
) -> Float[Array, "paths b t d"]:
    """The pixels of an image in the order in which each path visits them.

    Args:
      x: the image [B, H, W, D].
      scan: "cross", four paths over all pixels: along rows, along columns, and both from the end. Or
        "atrous", one path for each of the step * step grids of pixels that lie `step` apart: first those of
        column 0 by their row, then those of column 1, ..., by turns along rows and along columns.
      step: the distance of an atrous grid's pixels; an image that it does not divide gets rows and columns of
        zeros at its bottom and right, as in the paper's code.

    Returns:
      [4 or step * step, B, T, D], with T = H * W or ceil(H / step) * ceil(W / step).

    Raises:
      ValueError: naming the argument that can't be right.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> image = jnp.arange(6.0).reshape(1, 2, 3, 1)
        >>> frugax.kernels.paths_2d(image)[:, 0, :, 0].astype(int).tolist()
        [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    """
    x = as_shaped(x)
    _check(scan, step)
    if x.ndim != 4 or 0 in x.shape:
        reject("x", x, "[batch, height, width, D], every size >= 1")
    return _cross(x) if scan == "cross" else _atrous(x, step)


def merge_paths_2d(
    paths: Float[Array, "paths b t d"], height: int, width: int, *, scan: Scan = "cross", step: int = 2
) -> Float[Array, "b h w d"]:
    """The image in which each pixel is the sum of what the paths of `paths_2d` say about it.

    Args:
      paths: [paths, B, T, D], for the same scan and step.
      height, width: the image's.

    Returns:
      [B, H, W, D]; what stands for pixels outside of the image is left out.

    Raises:
      ValueError: naming the argument that can't be right.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> image = jnp.arange(6.0).reshape(1, 2, 3, 1)
        >>> paths = frugax.kernels.paths_2d(image, scan="atrous")
        >>> bool((frugax.kernels.merge_paths_2d(paths, 2, 3, scan="atrous") == image).all())
        True
    """
    paths = as_shaped(paths)
    _check(scan, step)
    count, tokens = (
        (4, height * width) if scan == "cross" else (step**2, -(-height // step) * -(-width // step))
    )
    if paths.ndim != 4 or paths.shape[0] != count or paths.shape[2] != tokens:
        reject("paths", paths, f"[{count}, batch, {tokens}, D] (paths of a {height} x {width} image)")
    # What reads pixels along paths is linear: its transpose adds up what paths say about pixels.
    image = jax.ShapeDtypeStruct((paths.shape[1], height, width, paths.shape[3]), paths.dtype)
    read = _cross if scan == "cross" else partial(_atrous, step=step)
    return jax.linear_transpose(read, image)(paths)[0]


def _check(scan: str, step: int) -> None:
    if scan not in ("cross", "atrous"):
        raise ValueError(f"scan: got {scan!r}; expected 'cross' or 'atrous'")
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step: got {step!r}; expected an integer >= 1")


def _cross(x: Array) -> Array:
    forwards = jnp.stack([_along_rows(x), _along_rows(jnp.swapaxes(x, 1, 2))])
    return jnp.concatenate([forwards, jnp.flip(forwards, 2)])


def _atrous(x: Array, step: int) -> Array:
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % step), (0, -x.shape[2] % step), (0, 0)))
    grids = [x[:, row::step, column::step] for column in range(step) for row in range(step)]
    by_turns = [jnp.swapaxes(grid, 1, 2) if i % 2 else grid for i, grid in enumerate(grids)]
    return jnp.stack([_along_rows(grid) for grid in by_turns])


def _along_rows(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, x.shape[3])
