"""An encoder of images for several tasks, each of which chooses its own experts."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ..layers.bidirectional import Bidirectional
from ..layers.channel.mlp import MLP
from ..layers.channel.moe import MoE
from ..layers.mixers.linear_attention import LinearAttention
from ..layers.mixers.mixer import Mixer
from ..layers.modules.dense import Dense
from ..layers.modules.stacked import STACKED
from ..layers.vision.selective_scan_2d import check_image
from .vision_mamba import merge_patches

GATES = ("router", "embedding")
Pairs = tuple[tuple[str, Any], ...]


class M3ViT(nn.Module):
    """A vision transformer for several tasks: every second MLP is a mixture of experts with routers by task.

    Patches get a linear map and a learned place; then come layers x + mixer(norm(x)), x + channel(norm(x)) in
    pairs, one with an MLP for a channel mixer and one with a `MoE`; then a norm. A task's forward pass
    touches the experts that its router chooses. The tasks' heads are the caller's.

    Attributes:
      tasks: how many there are.
      width: of tokens.
      pairs: of layers; the depth is twice that.
      patch: pixels along a patch.
      mixer: a sequence mixer, read both ways (`Bidirectional`); None: `LinearAttention()`.
      mlp_expand: hidden width of the MLPs over the width.
      moe_args: attributes of `MoE` that differ from 16 experts, 4 a token, each a fourth of the MLP, chosen
        by "noisy_top_k"; None: MLPs everywhere, an encoder that all tasks share.
      gate: "router": each task has routers of its own; "embedding": all share one router a layer, which reads
        a token beside an embedding of the task.
      gate_width: of that embedding.
      dtype, param_dtype: as in `Mixer`.

    Args of the call:
      x: images [B, H, W, C], of one size in all calls.
      task: a number from 0, or a traced scalar.

    Returns:
      Tokens [B, patches, width], row by row. Routers' losses and statistics are in "moe", as with `MoE`; a
      key `rngs={"router": ...}` says that the call is one of training.

    Raises:
      ValueError: naming the argument that can't be right.

    Source: Liang et al. 2022 (arXiv 2210.14793) and its code. Their mixer is softmax attention over all
    patches and a class token.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.models.M3ViT(tasks=2, width=16, pairs=1, moe_args={"experts": 4, "k": 2})
        >>> x = jnp.ones((2, 8, 8, 1))
        >>> variables = model.init(jax.random.key(0), x, 0)
        >>> y, sown = model.apply(variables, x, 1, mutable=["moe"])
        >>> y.shape, frugax.moe.total_loss(sown).shape
        ((2, 4, 16), ())
    """

    tasks: int = 2
    width: int = 64
    pairs: int = 2
    patch: int = 4
    mixer: Mixer | None = None
    mlp_expand: int | float = 4
    moe_args: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = ()
    gate: str = "router"
    gate_width: int = 16
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, task: Any) -> Array:
        check_image(x)
        self._check(task)
        dtypes = {"dtype": self.dtype or x.dtype, "param_dtype": self.param_dtype}
        x = merge_patches(x, self.patch)
        x = Dense(self.width, **dtypes, name="patches")(x.reshape(x.shape[0], -1, x.shape[-1]))
        places = self.param("places", nn.initializers.normal(0.02), x.shape[1:], self.param_dtype)
        x = x + places.astype(x.dtype)[None]
        about = self._embedded(task) if self.gate == "embedding" and self.moe_args is not None else None
        pairs = nn.scan(
            _Pair,
            **STACKED,
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.pairs,
            check_constancy_invariants=False,  # as in the decoder
        )
        mixer = LinearAttention() if self.mixer is None else self.mixer
        x, _ = pairs(
            mixer, self.mlp_expand, self._experts(), 4 * self.pairs, tuple(dtypes.items()), name="pairs"
        )(x, task, about)
        return nn.LayerNorm(**dtypes, name="norm")(x)

    def _experts(self) -> Pairs | None:
        if self.moe_args is None:
            return None
        chosen = {"experts": 16, "k": 4, "router": "noisy_top_k", "expand": self.mlp_expand / 4}
        chosen |= {"expert": "MLP", "activation": "gelu"} | dict(self.moe_args)
        return tuple((chosen | {"tasks": self.tasks if self.gate == "router" else None}).items())

    def _embedded(self, task: Any) -> Array:
        """norm(W_2 gelu(W_1 one-hot)), the task for the shared routers [gate_width], in float32."""
        y = jax.nn.one_hot(task, self.tasks)
        y = jax.nn.gelu(Dense(self.gate_width, name="task_in")(y))
        return nn.LayerNorm(name="task_norm")(Dense(self.gate_width, name="task_out")(y))

    def _check(self, task: Any) -> None:
        for name in ("tasks", "width", "pairs", "patch", "gate_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a number >= 1")
        if self.gate not in GATES:
            raise ValueError(f"gate: got {self.gate!r}; expected one of {', '.join(GATES)}")
        if jnp.ndim(task) or (isinstance(task, int) and not 0 <= task < self.tasks):
            raise ValueError(f"task: got {task}; expected a number from 0 to {self.tasks - 1}")


class _Pair(nn.Module):
    """A layer with an MLP and one with experts, as the scan over depth calls them."""

    mixer: Mixer
    mlp_expand: int | float
    moe_args: Pairs | None
    additions: int  # to the residual stream, in all
    dtypes: Pairs

    @nn.compact
    def __call__(self, x: Array, task: Any, about: Array | None) -> tuple[Array, None]:
        how = {"out_scale": self.additions**-0.5} | dict(self.dtypes)
        for name in ("first", "second"):
            mixer = self.mixer.clone(parent=None, **how)
            x = x + Bidirectional(mixer, name=f"{name}_mixer")(self._norm(x, f"{name}_mixer_norm"))
            y = self._norm(x, f"{name}_channel_norm")
            if name == "first" or self.moe_args is None:
                mlp = MLP(expand=self.mlp_expand, activation="gelu", **how, name=f"{name}_channel")
                x = x + mlp(y)
                continue
            experts = MoE(**dict(self.moe_args), **how, name="experts")
            if about is None:
                x = x + experts(y, task=task)
            else:
                beside = jnp.broadcast_to(about.astype(y.dtype), (*y.shape[:2], about.shape[-1]))
                x = x + experts(y, router_input=jnp.concatenate([y, beside], -1))
        return x, None

    def _norm(self, x: Array, name: str) -> Array:
        return nn.LayerNorm(**dict(self.dtypes), name=name)(x)
