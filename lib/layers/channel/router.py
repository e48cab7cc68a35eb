"""The router of a `MoE` layer: parameters and states of the routers that `frugax.moe` has as functions."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.experimental import checkify
from jax.typing import DTypeLike

from ... import moe
from ...kernels.common.arguments import accumulator
from ...kernels.common.documents import documents
from ...parallel.over_time import shards_as_rows
from ..modules.norms import rms_normalize

# Their arguments that the layer sets, or that come from a module's parameters and states.
_OF_LAYER = {
    "logits",
    "k",
    "mask",
    "bias",
    "key",
    "noise",
    "noise_logits",
    "gain",
    "train",
    "tokens",
    "table",
    "experts",
}
# What a router takes here beyond its function's own arguments, with defaults.
_EXTRA: dict[str, dict[str, Any]] = {
    "sigmoid_top_k": {"rate": 1e-3},
    "relu_route": {"chunk": 8, "steepness": 100.0},
    "hash_route": {"vocab_size": None},
    "soft_route": {"slots": 1},
}
ROUTERS = {
    name: getattr(moe, name)
    for name in (
        "softmax_top_k", "sigmoid_top_k", "noisy_top_k", "expert_choice", "sinkhorn_top_k", "base",
        "relu_route", "hash_route", "soft_route",
    )
}  # fmt: skip
LOSS_WEIGHTS: dict[str, tuple[tuple[str, float], ...]] = {
    "softmax_top_k": (("load_balance", 1e-2), ("z", 1e-3)),
    "sigmoid_top_k": (("load_balance", 1e-4),),
    "noisy_top_k": (("importance", 1e-2), ("load", 1e-2)),
    "relu_route": (("activation_locality", 1e-3), ("chunk_sparsity", 1e-2)),
}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a call, in one row; where devices share the time axis, as `shards_as_rows` orders them.

    Attributes:
      mask: those that count, bool [B * T]; None: all.
      starts: those whose predecessor is another document's, bool [B * T].
      ids: of the vocabulary [B * T]; None where the caller has none.
      rows: of the batch, B.
    """

    mask: Array | None
    starts: Array
    ids: Array | None
    rows: int

    def in_order(self, y: Array) -> Array:
        """y [B * T, ...], drawn for the tokens of rows after rows as on one device, in their order here."""
        return shards_as_rows(y.reshape(self.rows, -1, *y.shape[1:])).reshape(y.shape)


def tokens_of(
    shape: tuple[int, int], segment_ids: Array | None, lengths: Array | None, ids: Array | None
) -> Tokens:
    """Describe tokens [B, T] in one row [B * T]."""
    B, T = shape
    packed = documents(segment_ids, B, T)
    first = jnp.arange(T)[None] == 0
    starts = jnp.broadcast_to(first, (B, T)) if packed is None else packed.starts | first
    mask = None if lengths is None else jnp.arange(T)[None] < jnp.asarray(lengths)[:, None]
    in_one_row = lambda y: None if y is None else shards_as_rows(y).reshape(-1)  # noqa: E731
    return Tokens(in_one_row(mask), in_one_row(starts), in_one_row(ids), B)


class Router(nn.Module):
    """Scores of tokens by a learned matrix, and a router of `frugax.moe` on them.

    A call takes x [T, D] and returns the routing and the logits (None where there are none).

    Attributes:
      experts, k, router, args, jitter, tasks: as in `MoE`.
      param_dtype: of parameters, at least float32.
    """

    experts: int
    k: int
    router: str
    args: tuple[tuple[str, Any], ...] = ()
    jitter: float = 0.0
    tasks: int | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        tokens: Tokens,
        *,
        logits: Array | None = None,
        task: Any = None,
    ) -> tuple[moe.Routing | moe.SoftRouting, Array | None]:
        args = _arguments(self.router, self.args)
        if self.router == "hash_route":
            return self._hashed(tokens, **args), None
        if self.router == "soft_route":
            logits = self._soft_logits(x, args["slots"]) if logits is None else logits
            return moe.soft_route(logits, mask=tokens.mask), logits
        train = self.has_rng("router")
        if logits is None:
            if train and self.jitter:
                low, high = 1 - self.jitter, 1 + self.jitter
                factors = jax.random.uniform(self.make_rng("router"), x.shape, x.dtype, low, high)
                x = x * tokens.in_order(factors)
            logits = self._times(
                x, "kernel", nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal"), task
            )
        _check_finite(logits, tokens.mask)

        route = ROUTERS[self.router]
        how: dict[str, Any] = {"mask": tokens.mask}
        takes = inspect.signature(route).parameters
        if "k" in takes:
            how["k"] = self.k
        if "train" in takes:
            how["train"] = train
        if self.router == "expert_choice":
            args = {"capacity": float(self.k)} | args
        if self.router == "noisy_top_k" and (train or self.is_initializing()):
            how["noise_logits"] = self._times(x, "noise", nn.initializers.zeros, task)
            if train:
                how["noise"] = tokens.in_order(jax.random.normal(self.make_rng("router"), logits.shape))
        if self.router == "sigmoid_top_k":
            return self._balanced(logits, how | args), logits
        if self.router == "relu_route":
            chunk, steepness = args.pop("chunk"), args.pop("steepness")
            how["gain"] = self.param("gain", nn.initializers.ones, (self.experts,), self._dtype)
            return _with_sparsity(route(logits, **how, **args), logits, tokens, chunk, steepness), logits
        return route(logits, **how, **args), logits

    @property
    def _dtype(self) -> Any:
        return accumulator(jnp.dtype(self.param_dtype))

    def _times(self, x: Array, name: str, init: Any, task: Any) -> Array:
        """Logits [T, E] in float32: routing is not to depend on the dtype of the rest."""
        shape = (x.shape[-1], self.experts)
        if self.tasks is not None:
            stacked = self.param(name, init, (self.tasks, *shape), self._dtype)
            if task is None:
                raise ValueError(f"task: got None; expected one of {self.tasks} tasks, 0 to {self.tasks - 1}")
            if not isinstance(task, jax.core.Tracer) and not 0 <= int(task) < self.tasks:
                raise ValueError(
                    f"task: got {task}; expected one of {self.tasks} tasks, 0 to {self.tasks - 1}"
                )
            kernel = stacked[task]
        else:
            if task is not None:
                raise ValueError(f"task: got {task} without tasks; expected None, or tasks=N of the layer")
            kernel = self.param(name, init, shape, self._dtype)
        return jnp.dot(x.astype(kernel.dtype), kernel, precision="highest")

    def _balanced(self, logits: Array, how: dict[str, Any]) -> moe.Routing:
        """Sigmoid scores, and a bias in "router_state" that a call moves where that collection is mutable."""
        rate = how.pop("rate")
        self._check_state("bias")
        bias = self.variable("router_state", "bias", jnp.zeros, (self.experts,), jnp.float32)
        routing = moe.sigmoid_top_k(logits, bias=bias.value, **how)
        if self.is_mutable_collection("router_state") and not self.is_initializing():
            bias.value = moe.updated_bias(bias.value, routing.statistics.load, rate)
        return routing

    def _hashed(self, tokens: Tokens, vocab_size: int | None) -> moe.Routing:
        if tokens.ids is None:
            raise ValueError("token_ids: got None; expected the ids [B, T] of the tokens for hash_route")
        if not vocab_size or vocab_size < 1:
            raise ValueError(f"router_args: got vocab_size={vocab_size}; expected the number of token ids")
        self._check_state("table")

        def shuffled():
            ids = jax.random.permutation(self.make_rng("params"), vocab_size)
            return (ids % self.experts).astype(jnp.int32)

        table = self.variable("router_state", "table", shuffled)
        return moe.hash_route(tokens.ids, table.value, self.experts, mask=tokens.mask)

    def _soft_logits(self, x: Array, slots: int) -> Array:
        """scale * x / |x| times the slots' vectors of unit length [T, E, S]."""
        shape = (x.shape[-1], self.experts, slots)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self._dtype)
        scale = self.param("scale", nn.initializers.ones, (), self._dtype)
        width = x.shape[-1] ** -0.5
        unit = rms_normalize(kernel.reshape(x.shape[-1], -1).T, 1e-12) * width
        x = rms_normalize(x.astype(kernel.dtype), 1e-12) * width
        logits = scale * jnp.dot(x, unit.T, precision="highest")
        return logits.reshape(-1, self.experts, slots)

    def _check_state(self, name: str) -> None:
        there = self.has_variable("router_state", name) or self.is_mutable_collection("router_state")
        if not there:
            raise ValueError(
                f"variables: got no 'router_state'; expected that of init or of training, with the {name} of "
                f"{self.router}"
            )


def check_router(router: str, args: tuple[tuple[str, Any], ...]) -> None:
    """Raise ValueError unless there is such a router and it takes these arguments."""
    if router not in ROUTERS:
        raise ValueError(f"router: got {router!r}; expected one of {', '.join(ROUTERS)}")
    own = set(inspect.signature(ROUTERS[router]).parameters) - _OF_LAYER
    known = sorted(own | set(_EXTRA.get(router, {})))
    for name, _ in args:
        if name not in known:
            there_are = ", ".join(known) or "none"
            raise ValueError(f"router_args: {router} takes no {name!r}; expected {there_are}")


def _arguments(router: str, args: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return _EXTRA.get(router, {}) | dict(args)


def _with_sparsity(
    routing: moe.Routing, logits: Array, tokens: Tokens, chunk: int, steepness: float
) -> moe.Routing:
    """Put BlockFFN's losses in: neighbours and chunks are of one document's tokens that count."""
    real = jnp.ones_like(tokens.starts) if tokens.mask is None else tokens.mask
    losses = {
        "activation_locality": moe.activation_locality(logits, real & ~tokens.starts, steepness=steepness),
        "chunk_sparsity": moe.chunk_sparsity(
            jax.nn.relu(logits), tokens.mask, chunk=chunk, starts=tokens.starts
        ),
    }
    return dataclasses.replace(routing, losses=losses)


def _check_finite(logits: Array, mask: Array | None) -> None:
    finite = jnp.isfinite(logits).all(-1)
    right = jnp.all(finite if mask is None else finite | ~mask)
    checkify.debug_check(right, "router: a logit is not finite; expected finite inputs and parameters")
