"""The mixture of experts: a channel mixer that sends each token to a few of many stacked experts."""

import functools
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ... import moe
from ...compress import CompressedTernary
from ...formats import QuantizedTensor
from ...kernels.common.operation import Backend
from ...kernels.common.rows import rows
from ...moe.dispatch import limited
from ...moe.experts import Kernel
from ...parallel.activations import in_stage
from ...parallel.experts import as_tuple, experts_over_mesh, own_tokens
from ...parallel.over_time import (
    check_whole_rows,
    refuse_split_time,
    rows_as_shards,
    shards_as_rows,
    token_axes,
)
from ..modules.inputs import check_input
from ..modules.packed import matrix_param
from .mlp import GLU, MLP, activation_fn
from .router import LOSS_WEIGHTS, Router, Tokens, check_router, tokens_of

EXPERTS = {"GLU": GLU, "MLP": MLP}
DISPATCH = ("sort", "gather", "einsum", "dense", "expert_major")


class MoE(nn.Module):
    """A mixture of experts: the weighted sum of what a token's experts make of it, and of a shared expert.

    Attributes:
      experts: how many there are.
      k: experts a token, of the routers that take it; of "expert_choice" the mean.
      router: a router of `frugax.moe`: "softmax_top_k", "sigmoid_top_k" (balanced by a bias, without a loss),
        "noisy_top_k", "sinkhorn_top_k", "base", "relu_route" (BlockFFN), "hash_route", or "expert_choice" and
        "soft_route", which look at all tokens of a call, later ones too: a causal model is then none, and
        `Decoder` refuses "soft_route".
      router_args: the router's other arguments, as a mapping or pairs: "sigmoid_top_k" has `rate` for the
        bias, "relu_route" `chunk` and `steepness` of its losses, "hash_route" `vocab_size`, "soft_route"
        `slots` of an expert.
      expert: "GLU" or "MLP".
      expand: hidden width of one expert over the input's, rounded up to a multiple of 8.
      activation: as in `GLU`; "relu" with "GLU" is ReGLU.
      ternary: routed experts have weights -1, 0 and 1, and inputs of 8 bits, trained straight through.
      shared_expand: hidden width of the shared expert, which is never ternary, over the input's; 0: none.
      shared_frozen: no gradient reaches the shared expert. Decay of an optimizer still does.
      dispatch: "sort" drops no token; "gather" and "einsum" have a capacity; "dense" applies every expert to
        every token, which serves where most experts are active or very small; "expert_major" applies one
        after another, with the weights of two at hand and no gradient (`frugax.moe.expert_by_expert`).
      capacity: tokens of an expert, with "gather" and "einsum": a number, or as a float a factor of the mean.
        Training drops any token ("router" key), other calls the last ones.
      loss_weights: factors of the router's losses by name; None: 1e-2 for load balance, importance and load,
        1e-3 for z, 1e-4 for load balance with "sigmoid_top_k", 1e-3 and 1e-2 for BlockFFN's two.
      jitter: in training the router's input is multiplied by uniform numbers in 1 - jitter to 1 + jitter.
      tasks: number of tasks, each with a router of its own; the call then takes `task`.
      remat: compute the experts again in the backward pass instead of keeping their hidden values.
      expert_axis: axes of `jax.set_mesh`'s mesh that experts are split over: tokens travel to them and back
        (`frugax.parallel.experts_over_mesh`), by "sort", or by "gather", which drops what it drops on one
        device, but in training, where it draws others; where devices share the time axis, a capacity is for
        tokens in the order of devices. Packed experts are split as arrays are. Without a mesh all experts are
        here. None: the compiler does what the experts' sharding asks for, with all draws of one device.
      dtype, param_dtype, out_scale, backend: as in `Mixer`. The router's parameters are float32.

    Args of the call:
      x: [B, T, D], floating.
      segment_ids: the documents of tokens [B, T], for losses about neighbours.
      lengths: how many tokens of each row are real [B]. Others are sent nowhere, have no share in loads,
        capacities or losses, and give zeros.
      routing: a ready `frugax.moe.Routing` of the B * T tokens: the layer then has no router.
      router_input: what the router reads [B, T, any width]; None: x.
      logits: the router's logits [B, T, E], from elsewhere: it then has no matrix of its own. Of "soft_route"
        [B, T, E, slots].
      next_logits: those of another layer, whose experts are announced in "moe" as "announced".
      token_ids: for "hash_route", [B, T].
      task: which router, a number or a traced scalar.

    Returns:
      [B, T, D]. With `mutable=["moe"]` also the collection "moe": "loss", to be added to the loss of
      training, and "statistics" with "routing" (a `RoutingStatistics`), "dropped" (the share of assignments),
      "active" (experts of a token, on average) and "losses" (by name, unscaled, with gradients). In
      `frugax.moe`, `total_loss` and `load_summary` take them together over layers. With
      `mutable=["router_state"]` the bias of "sigmoid_top_k" moves. A key `rngs={"router": ...}` says that the
      call is one of training: noise, jitter and balanced choices are only there.

    Raises:
      ValueError: naming the argument that can't be right. Logits that are not finite give outputs that are
        none, and fail a check of `checkify`.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MoE(experts=4, k=2), jax.random.normal(jax.random.key(0), (2, 5, 16))
        >>> variables = layer.init(jax.random.key(1), x)
        >>> y, sown = layer.apply(variables, x, mutable=["moe"])
        >>> y.shape, sown["moe"]["statistics"]["routing"].load.shape
        ((2, 5, 16), (4,))
        >>> bool(frugax.moe.total_loss(sown) == sown["moe"]["loss"])
        True
    """

    experts: int = 8
    k: int = 2
    router: str = "softmax_top_k"
    router_args: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    expert: str = "GLU"
    expand: int | float = 4 / 3
    activation: str | None = "silu"
    ternary: bool = False
    shared_expand: int | float = 0.0
    shared_frozen: bool = False
    dispatch: str = "sort"
    capacity: int | float | None = None
    loss_weights: Mapping[str, float] | Iterable[tuple[str, float]] | None = None
    jitter: float = 0.0
    tasks: int | None = None
    remat: bool = False
    expert_axis: str | tuple[str, ...] | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    out_scale: float = 1.0
    backend: Backend | None = None

    # What a `Block` hands on to its channel mixer, if that takes it.
    takes: ClassVar[tuple[str, ...]] = ("segment_ids", "lengths", "token_ids", "router_input", "logits")

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        routing: moe.Routing | moe.SoftRouting | None = None,
        router_input: Array | None = None,
        logits: Array | None = None,
        next_logits: Array | None = None,
        token_ids: Array | None = None,
        task: Any = None,
    ) -> Array:
        check_input(x, segment_ids)
        self._check()
        x = x if self.dtype is None else x.astype(self.dtype)
        rows(x.shape[:2], segment_ids, lengths)  # checks them
        check_whole_rows(routing=routing)
        if self.router == "relu_route":
            refuse_split_time("MoE", "the losses of router 'relu_route' compare neighbours")
        tokens = tokens_of(x.shape[:2], segment_ids, lengths, token_ids)
        router_input, logits, next_logits = (
            None if y is None else shards_as_rows(y) for y in (router_input, logits, next_logits)
        )
        x = shards_as_rows(x)
        B, T, D = x.shape

        def flattened(y: Array) -> Array:
            """[B * T, width], with zeros past rows' ends: gradients of products would read a NaN there."""
            y = y.reshape(B * T, -1)
            return y if tokens.mask is None else jnp.where(tokens.mask[:, None], y, 0)

        flat = flattened(x)
        in_order = lambda y: rows_as_shards(y.reshape(B, T, *y.shape[1:])).reshape(y.shape)  # noqa: E731
        if routing is None:
            router = Router(
                self.experts, self.k, self.router, _pairs(self.router_args), self.jitter, self.tasks,
                self.param_dtype, name="router",
            )  # fmt: skip
            reads = x if router_input is None else router_input
            if reads.shape[:2] != (B, T):
                raise ValueError(f"router_input: got {list(reads.shape)}; expected [{B}, {T}, width]")
            soft = self.router == "soft_route"
            if soft and next_logits is not None:
                raise ValueError(
                    "next_logits: got some for soft_route, which chooses no experts; expected None"
                )
            width = (self.experts, *[dict(_pairs(self.router_args)).get("slots", 1)] * soft)
            for name, of in (("logits", logits), ("next_logits", next_logits)):
                if of is not None and of.shape != (B, T, *width):
                    got = f"{name}: got {list(of.shape)}"
                    raise ValueError(f"{got}; expected {[B, T, *width]}, one an expert{' and slot' * soft}")
            given = None if logits is None else flattened(logits)
            given = given.reshape(B * T, *width) if soft and given is not None else given
            routing, scores = router(flattened(reads), tokens, logits=given, task=task)
            if isinstance(routing, moe.Routing) and (logits is not None or router_input is not None):
                self._sow("chosen", in_order(routing.indices))  # known early: what to fetch
            if next_logits is not None and self.is_mutable_collection("moe"):
                ahead, _ = router(flat, tokens, logits=flattened(next_logits))
                self._sow("announced", in_order(ahead.indices))
        else:
            self._check_routing(routing, B * T)
            scores = None

        y, dropped = self._mix(flat, routing, tokens)
        if self.shared_expand:
            shared = self._shared()(rows_as_shards(flat.reshape(B, T, D)))
            y = y + shards_as_rows(shared).reshape(-1, D)
        if tokens.mask is not None:
            y = jnp.where(tokens.mask[:, None], y, 0)
        if scores is not None:  # a token that was dropped or sent nowhere must not hide them
            lost = ~jnp.isfinite(scores).reshape(B * T, -1).all(-1)
            lost = lost if tokens.mask is None else lost & tokens.mask
            y = jnp.where(lost[:, None], jnp.nan, y)
        self._report(routing, dropped, B * T if tokens.mask is None else jnp.sum(tokens.mask))
        return rows_as_shards(y.reshape(B, T, D))

    def _mix(self, x: Array, routing: Any, tokens: Tokens) -> tuple[Array, Array]:
        """Send tokens x [B * T, D] to experts and back; and the share of assignments that were dropped."""
        D = x.shape[-1]
        hidden = -8 * (-round(self.expand * D) // 8)
        first = {"GLU": ("gate_in", 2 * hidden), "MLP": ("in", hidden)}[self.expert]
        shapes = {first[0]: (self.experts, D, first[1]), "out": (self.experts, hidden, D)}
        modules = Experts(shapes, self.out_scale, self.param_dtype, name="experts")()
        kernels = {name: module() for name, module in modules.items()}
        how: dict[str, Any] = {"activation": activation_fn(self.activation), "ternary": self.ternary}
        calibrating = self.is_mutable_collection("params")  # nothing is computed again then, or for nobody
        remat: Any = jax.checkpoint if self.remat and not calibrating else lambda f: f
        method = "sort" if self.dispatch in ("dense", "expert_major") and calibrating else self.dispatch
        here = jax.sharding.get_abstract_mesh().empty  # outside of `jax.set_mesh`, as in evaluation
        if self.expert_axis is not None and not here and not calibrating:
            apply = remat(functools.partial(moe.apply_experts, **how, backend=self.backend))
            return self._over_mesh(x, routing, kernels, apply)
        if method == "dense" and isinstance(routing, moe.Routing):
            dense = remat(functools.partial(moe.dense_experts, **how))
            mine = lambda x, routing, w: dense(x, routing.dense_weights(x.shape[0]), w)  # noqa: E731
            return own_tokens(mine, x, routing, kernels), jnp.zeros(())
        if method == "expert_major" and isinstance(routing, moe.Routing):

            def one(kernels: Any, rows: Array) -> Array:
                alone = jax.tree.map(lambda w: w[None], kernels)
                return moe.apply_experts(rows[None], alone, **how, backend=self.backend)[0]

            return moe.expert_by_expert(one, kernels, x, routing), jnp.zeros(())

        sends: dict[str, Any] = {}
        dropped: Array = jnp.zeros(())
        if isinstance(routing, moe.Routing) and method != "sort":
            sends = {"capacity": self.capacity, "order": self._order(routing, tokens)}
            if in_stage():  # the compiler can't split the gather over all axes: drop, and sort what is left
                (routing, dropped), sends = limited(routing, len(x), **sends), {}
                method = "sort"
        sorts = method == "sort" and isinstance(routing, moe.Routing) and not calibrating
        if sorts and not any(isinstance(kernel, CompressedTernary) for kernel in kernels.values()):
            routed = remat(functools.partial(moe.routed_experts, **how, backend=self.backend))
            return own_tokens(routed, x, routing, kernels), dropped
        apply = remat(functools.partial(moe.apply_experts, **how, backend=self.backend))
        sent, plan = moe.dispatch(x, routing, method=method, **sends)
        sizes = plan.group_sizes if plan.method == "sort" else None
        if calibrating:
            observe = lambda name, rows: modules[name].reads(rows, plan.group_sizes)  # noqa: E731
            apply = functools.partial(apply, observe=observe)
        return moe.combine(apply(sent, kernels, sizes), plan), dropped + plan.dropped

    def _order(self, routing: moe.Routing, tokens: Tokens) -> Array:
        """The order in which assignments find places, that of one device: any in training."""
        order = jnp.arange(routing.indices.size)
        if self.has_rng("router"):
            order = jax.random.permutation(self.make_rng("router"), order)
        order = order.reshape(routing.indices.shape)
        return (tokens.in_order(order) if routing.by == "token" else order).reshape(-1)

    def _over_mesh(self, x: Array, routing: Any, kernels: Any, apply: Any) -> tuple[Array, Array]:
        """The same where devices share the experts."""
        y, load = experts_over_mesh(
            x,
            routing,
            lambda kernels, rows, sizes: apply(rows, kernels, sizes),
            kernels,
            axis_name=self.expert_axis,
            token_axes=token_axes(*as_tuple(self.expert_axis)),
            capacity=self.capacity,
            key=self.make_rng("router") if self.dispatch == "gather" and self.has_rng("router") else None,
        )
        return y, load.dropped

    def _shared(self) -> nn.Module:
        kind: Any = EXPERTS[self.expert]
        if self.shared_frozen:
            frozen = functools.partial(jax.tree.map, jax.lax.stop_gradient)
            kind = nn.map_variables(kind, "params", trans_in_fn=frozen, init=self.is_initializing())
        return kind(
            expand=self.shared_expand,
            activation=self.activation,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            out_scale=self.out_scale,
            backend=self.backend,
            name="shared",
        )

    def _report(self, routing: moe.Routing | moe.SoftRouting, dropped: Array, tokens: int | Array) -> None:
        """Sow the weighted loss and the statistics of a call."""
        if isinstance(routing, moe.SoftRouting) or not self.is_mutable_collection("moe"):
            return
        weights = dict(_pairs(self._loss_weights))
        unknown = sorted(set(weights) - set(routing.losses))
        if unknown and self.loss_weights is not None:
            got, known = f"loss_weights: got {unknown[0]!r}", ", ".join(routing.losses) or "none"
            raise ValueError(f"{got}; expected losses of {self.router}: {known}")
        loss = sum((w * routing.losses[n] for n, w in weights.items() if n in routing.losses), jnp.zeros(()))
        active = jnp.sum(routing.weights != 0) / jnp.maximum(tokens, 1)
        values = {"routing": routing.statistics, "dropped": dropped, "active": active}
        self._sow("statistics", jax.lax.stop_gradient(values) | {"losses": routing.losses})
        self._sow("loss", loss)

    @property
    def _loss_weights(self) -> Any:
        return LOSS_WEIGHTS.get(self.router, ()) if self.loss_weights is None else self.loss_weights

    def _sow(self, name: str, value: Any) -> None:
        # The last call's, but for losses, which add up. Not at init: its variables are to have none.
        if self.is_initializing():
            return
        if name == "loss":
            self.sow("moe", name, value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))
        else:
            self.sow("moe", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)

    def _check_routing(self, routing: moe.Routing | moe.SoftRouting, tokens: int) -> None:
        soft = isinstance(routing, moe.SoftRouting)
        experts = routing.into.shape[1] if soft else routing.experts
        if experts != self.experts:
            raise ValueError(f"routing: got {experts} experts; expected {self.experts}, those of the layer")
        routed = routing.into.shape[0] if soft else len(routing.indices) if routing.by == "token" else tokens
        if routed != tokens:
            raise ValueError(f"routing: got {routed} tokens; expected {tokens}, those of x")

    def _check(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts: got {self.experts}; expected a number >= 1")
        if not 1 <= self.k <= self.experts:
            raise ValueError(f"k: got {self.k}; expected 1 to {self.experts}, the number of experts")
        for name, known in (("expert", tuple(EXPERTS)), ("dispatch", DISPATCH)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.expand <= 0 or self.shared_expand < 0:
            which = "expand" if self.expand <= 0 else "shared_expand"
            raise ValueError(f"{which}: got {getattr(self, which)}; expected a number above 0")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: got {self.jitter}; expected a number of at least 0 and below 1")
        number = isinstance(self.capacity, numbers.Real) and not isinstance(self.capacity, bool)
        fits = number and self.dispatch in ("gather", "einsum")
        if self.capacity is not None and not (fits and 0 < self.capacity < float("inf")):
            got = f"capacity: got {self.capacity!r} with dispatch={self.dispatch!r}"
            raise ValueError(f"{got}; expected None, or a number above 0 with 'gather' or 'einsum'")
        if self.expert_axis is not None and self.dispatch not in ("sort", "gather"):
            got = f"dispatch: got {self.dispatch!r} with expert_axis={self.expert_axis!r}"
            raise ValueError(f"{got}; expected 'sort' or 'gather'")
        check_router(self.router, _pairs(self.router_args))


class Experts(nn.Module):
    """The modules of all kernels of experts, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    out_scale: float
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> dict[str, "StackedKernel"]:
        scales = {name: self.out_scale if name == "out" else 1.0 for name in self.shapes}
        return {
            name: StackedKernel(shape, scales[name], self.param_dtype, name=name)
            for name, shape in self.shapes.items()
        }


class StackedKernel(nn.Module):
    """The kernels of all experts, stacked: an array, `QuantizedTensor` or `CompressedTernary` [E, K, N]."""

    shape: tuple[int, ...]
    scale: float
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self) -> Kernel:
        init = nn.initializers.variance_scaling(
            self.scale**2, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
        )
        packed = QuantizedTensor, CompressedTernary
        return matrix_param(self, "kernel", init, self.shape, self.param_dtype, packed)

    def reads(self, x: Array, group_sizes: Array) -> None:
        """Do nothing with the rows that each expert is about to multiply: calibration intercepts the call."""


def _pairs(items: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    items = items.items() if isinstance(items, Mapping) else items
    return tuple((str(name), value) for name, value in items)
