"""A decoder cut into the stages of a pipeline: pure functions of its params."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from ..layers.block import Announced
from ..moe.collected import load_summary, total_loss
from ..parallel.activations import automatic_axes, in_stage
from .decoder import Decoder


class Stages(NamedTuple):
    """The functions that `frugax.parallel.pipeline_gradients` calls, and the split of params that it takes.

    Attributes:
      first, stage, last: as it describes them. Layers carry their part of the collections, by name.
      split: params of the decoder -> (shared, layers).
      join: (shared, layers) -> params, or their gradients.
    """

    first: Callable[[Any, Any], Any]
    stage: Callable[[Any, Any, Any, Any, Any, Array], tuple[Any, Array, Any, Any]]
    last: Callable[[Any, Any, Any], tuple[Array, Any]]
    split: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    join: Callable[[Any, Any], dict[str, Any]]


def decoder_stages(
    decoder: Decoder,
    stages: int,
    loss: Callable[[Callable[[Array], Array], Array, Any], tuple[Array, Any]],
    *,
    layers_as: Callable[[nn.Module], nn.Module] = lambda layers: layers,
) -> Stages:
    """Cut a decoder into stages of consecutive repeats: the first embeds tokens, the last has norm and head.

    A microbatch is a dict: "tokens" [B, T], "segment_ids" [B, T] or None, what `loss` reads, and if layers
    draw "rngs", keys by name: those that the whole decoder would be applied with, whose draws stages share.
    Experts' balance losses are part of the stages' losses, and their `frugax.moe.load_summary` is what stages
    report.

    Args:
      decoder: its params lie as always: `stages` is no part of a checkpoint.
      stages: parts of the depth, v P for v chunks on each of P devices.
      loss: (head, hidden, microbatch) -> loss, report. The head makes logits [..., vocab_size] of any part of
        hidden [B, T, width].
      layers_as: the module of a repeat of the blocks -> the one to apply to its params, such as
        `frugax.quant.training.LowBit`.

    Returns:
      Its `Stages`.

    Raises:
      ValueError: stages don't divide the repeats.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.models.Decoder(vocab_size=7, width=8, repeats=4)
        >>> cut = frugax.models.decoder_stages(model, 2, lambda head, x, batch: (head(x).sum(), {}))
        >>> batch = {"tokens": jnp.array([[1, 2, 3]]), "segment_ids": None}
        >>> params = model.init(jax.random.key(0), batch["tokens"])["params"]
        >>> shared, layers = cut.split(params)
        >>> x = cut.first(shared, batch)
        >>> for number in range(2):
        ...     mine = jax.tree.map(lambda w: w[2 * number : 2 * number + 2], layers)
        ...     x, _, _, _ = cut.stage(shared, mine, {}, x, batch, number)
        >>> whole, _ = model.apply({"params": params}, batch["tokens"])
        >>> bool(jnp.allclose(cut.last(shared, x, batch)[0], whole.sum(), rtol=1e-4))
        True
    """
    if decoder.repeats % stages:
        raise ValueError(
            f"repeats: got {decoder.repeats}; expected a multiple of {stages}, the stages of a pipeline"
        )
    n = decoder.repeats // stages

    def beside(shared, tokens):
        def of_kind(kind):
            module, params = kind(param_dtype=decoder.param_dtype, parent=None), shared.get(kind.__name__, {})
            return lambda depth, width: module.apply({"params": params}, depth, width)

        return decoder.beside_layers(decoder.over_depth(of_kind), shared.get("pre_gates"), tokens)

    def first(shared, microbatch):
        tokens = microbatch["tokens"]
        x = _rows_of(decoder, nn.meta.unbox(shared["embedding"]), tokens)
        announced = beside(shared, tokens)[2]
        return x, (None if announced is None else announced.logits)

    def stage(shared, layers, carried, x, microbatch, number):
        x, logits = x
        over_depth, given, _ = beside(shared, microbatch["tokens"])
        of_repeats = over_depth, decoder.repeat_rngs(microbatch.get("rngs", {}))
        mine = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, number * n, n), of_repeats)
        announced = None if logits is None else Announced(jnp.asarray(number > 0), logits)
        one = layers_as(decoder.repeat(parent=None))

        def repeat(x, of_one):
            params, carried, (over_depth, rngs) = of_one
            (x, _), new = one.apply(
                {"params": params, **carried},
                x,
                (None,) * len(decoder.blocks),
                over_depth,
                {"segment_ids": microbatch["segment_ids"]},
                None,
                given,
                rngs=rngs,
                mutable=["moe", *carried],
            )
            return x, ({"moe": new.get("moe", {})}, {name: new[name] for name in carried})

        (x, announced), (sown, carried) = jax.lax.scan(
            repeat, (x, announced), (layers, carried, mine), unroll=n if decoder.unroll else 1
        )
        report = jax.tree.map(lambda mean: mean / stages, load_summary(sown))
        return (x, None if announced is None else announced.logits), total_loss(sown), report, carried

    def last(shared, x, microbatch):
        x = decoder.last_norm(parent=None).apply({"params": shared.get("norm", {})}, x[0])
        return loss(lambda x: decoder.apply({"params": shared}, x, method="head"), x, microbatch)

    def split(params):
        return {name: x for name, x in params.items() if name != "layers"}, params["layers"]

    return Stages(first, stage, last, split, lambda shared, layers: {**shared, "layers": layers})


def _rows_of(decoder: Decoder, table: Any, tokens: Array) -> Array:
    """The embeddings of tokens, read so that the compiler's partitioner gets through.

    In a program with a manual axis it ends the process where it reads rows of a table that is split by
    channels over the axis that splits the tokens (jax 0.10.2), and libtpu's where the table is split by rows.
    So channels are gathered, and of rows each device along "tensor" reads its own.
    """
    if not isinstance(table, Array) or not in_stage():
        return decoder.rows_of(table, tokens)
    table = jax.lax.with_sharding_constraint(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))
    V, devices = table.shape[0], automatic_axes().get("tensor", 1)
    if devices == 1 or V % devices:
        return decoder.rows_of(table, tokens)

    def of_share(table, tokens):
        n = table.shape[0]
        here = tokens - jax.lax.axis_index("tensor") * n
        mine = (here >= 0) & (here < n)
        rows = decoder.rows_of(table, jnp.where(mine, here, 0))
        return jax.lax.psum(jnp.where(mine[..., None], rows, 0), "tensor")

    split = jax.shard_map(
        of_share,
        in_specs=(PartitionSpec("tensor"), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"tensor"},
    )
    known = (tokens >= 0) & (tokens < V)
    return jnp.where(known[..., None], split(table, tokens), jnp.nan)
