"""Run by test_experts.py on eight devices: experts over devices, against all of them on one device."""

import re
import sys
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import frugax
from tests.errors import assert_close

T, D, E, H, K = 5, 3, 16, 4, 2  # T: tokens of a device
AXES = ("data", "sequence", "tensor")


class Folding(NamedTuple):
    """Mesh axes that experts, and their hidden width, are split over; over the rest there are copies."""

    experts: tuple[str, ...]
    tensor: tuple[str, ...] = ()


FOLDINGS = {
    "all": Folding(AXES),
    "copies": Folding(("sequence", "tensor")),
    "coupled": Folding(("data", "sequence"), ("tensor",)),
    "tensor and copies": Folding(("data",), ("sequence",)),
}
DROPS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "by device": dict(capacity=1),
    "over all": dict(capacity=1.0, capacity_axes=AXES),
    "over a sequence": dict(capacity=1.0, capacity_axes=("sequence", "tensor")),
    "many rows": dict(max_rows=2),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def arguments():
    params = {"in": normal(2, E, D, 2, H), "out": normal(3, E, H, D)}
    # Skewed, so that capacities are reached.
    return normal(0, 8 * T, D), {
        "router": normal(1, D, E) + 0.5 * jnp.arange(E, dtype=jnp.float32)[None] / E,
        "experts": params,
    }


def glu(params, rows, sizes):
    """Gated units of rows by expert."""
    wide = jax.lax.ragged_dot(rows, params["in"].reshape(*params["in"].shape[:2], -1), sizes)
    gate, value = jnp.split(wide, 2, -1)
    return jax.lax.ragged_dot(jax.nn.silu(gate) * value, params["out"], sizes)


def losses(logits, routing, axes=()):
    probabilities = jax.nn.softmax(logits)
    balance = frugax.moe.load_balance(probabilities, routing.indices, axis_name=axes)
    return balance + 0.1 * frugax.moe.z_loss(logits, axis_name=axes)


def kept(indices: np.ndarray, drop: dict, devices: int) -> np.ndarray:
    """The assignments [T, k] that find a place, by a loop."""
    if not drop:
        return np.ones(indices.shape, bool)
    if "max_rows" in drop:  # of each device to another, in the order of experts, then of tokens
        found = np.zeros(indices.shape, bool)
        for start in range(0, len(indices), T):
            mine = indices[start : start + T].reshape(-1)
            order = np.argsort(mine, kind="stable")
            for device in range(devices):
                to = order[mine[order] // (E // devices) == device][: drop["max_rows"]]
                found[start + to // K, to % K] = True
        return found
    axes = drop.get("capacity_axes", ())
    tokens = T * 2 ** len(axes)  # neighbours that share capacity: `axes` are the mesh's last ones
    limit = drop["capacity"]
    limit = int(np.ceil(limit * tokens * K / E)) if isinstance(limit, float) else limit
    found = np.zeros(indices.shape, bool)
    for start in range(0, len(indices), tokens):
        taken = np.zeros(E, int)
        for choice in range(K):
            for token in range(start, start + tokens):
                expert = indices[token, choice]
                found[token, choice] = taken[expert] < limit
                taken[expert] += 1
    return found


def one_device(x, params, keep):
    """All experts of all tokens, weighted: (y, loss)."""
    logits = x @ params["router"]
    routing = frugax.moe.softmax_top_k(logits, K)
    wide = jnp.einsum("td,edgh->tegh", x, params["experts"]["in"])
    y = jnp.einsum("teh,ehd->ted", jax.nn.silu(wide[:, :, 0]) * wide[:, :, 1], params["experts"]["out"])
    weight = jnp.sum(jax.nn.one_hot(routing.indices, E) * (routing.weights * keep)[..., None], 1)
    y = jnp.einsum("te,ted->td", weight, y)
    return y, losses(logits, routing)


def both(layer):
    """Output, load, and gradients of x and params."""

    def scalar(x, params):
        y, loss, load = layer(x, params)
        return jnp.sum(y * normal(9, *y.shape)) + loss, (y, load)

    def run(x, params):
        (value, (y, load)), gradients = jax.value_and_grad(scalar, (0, 1), has_aux=True)(x, params)
        return (value, y, gradients), load

    return run


def inside(folding, options, mesh):
    """Router, losses and experts on each device's tokens."""

    def local(x, params):
        logits = x @ params["router"]
        routing = frugax.moe.softmax_top_k(logits, K)
        y, load = frugax.parallel.expert_parallel(
            x,
            routing,
            glu,
            params["experts"],
            axis_name=folding.experts,
            tensor_axis=folding.tensor,
            token_axes=AXES,
            **options,
        )
        return y, losses(logits, routing, AXES), load

    width = folding.tensor or None
    specs = {"in": P(folding.experts, None, None, width), "out": P(folding.experts, width)}
    specs = P(AXES), {"router": P(), "experts": specs}
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(AXES), P(), P()))


def outside(folding, options, mesh):
    """Router and losses on whole arrays."""

    def layer(x, params):
        logits = x @ params["router"]
        routing = frugax.moe.softmax_top_k(logits, K)
        y, load = frugax.parallel.experts_over_mesh(
            x,
            routing,
            glu,
            {"in": params["experts"]["in"], "out": params["experts"]["out"]},
            axis_name=folding.experts,
            token_axes=AXES,
            mesh=mesh,
            **options,
        )
        return y, losses(logits, routing), load

    return layer


def received(text: str, devices: int, tensor: int) -> dict[str, int]:
    """Bytes of float32 that a device receives by each collective of a compiled program."""
    share = {  # of a result's bytes
        "all-to-all": (devices - 1) / devices,
        "all-gather": (tensor - 1) / tensor,
        "reduce-scatter": tensor - 1,
    }
    found = {}
    for name, part in share.items():
        results = re.findall(rf"= (.*?) {name}(?:-start)?\(", text)
        shapes = [dims for result in results for dims in re.findall(r"f32\[([\d,]*)\]", result)]
        total = sum(4 * prod(int(n) for n in dims.split(",") if n) for dims in shapes)
        found[name.replace("-", "_")] = round(total * part)
    return found


def check(mesh, form, name, drop) -> None:
    folding, options = FOLDINGS[name], DROPS[drop]
    x, params = arguments()
    indices = np.asarray(frugax.moe.softmax_top_k(x @ params["router"], K).indices)
    devices, tensor = 2 ** len(folding.experts), 2 ** len(folding.tensor)
    keep = kept(indices, DROPS[drop], devices)
    reference = both(lambda x, params: (*one_device(x, params, keep), ()))
    wanted, _ = jax.jit(reference)(x, params)
    # Values, losses and gradients of tokens, router and experts.
    compiled = jax.jit(both(form(folding, options, mesh))).lower(x, params).compile()
    got, load = compiled(x, params)
    assert_close(got, wanted, "float32", name=f"{name}, {drop}")
    tokens = np.bincount(indices[keep], minlength=E)
    np.testing.assert_array_equal(load.tokens, tokens)
    np.testing.assert_allclose(load.dropped, 1 - keep.mean(), atol=1e-6)
    assert bool(keep.all()) == (drop == "nothing")
    capacity = options["capacity"] if drop == "by device" else None
    formula = frugax.parallel.expert_parallel_bytes(
        T, D, E, K, devices=devices, tensor=tensor, capacity=capacity, itemsize=4
    )
    if drop in ("nothing", "by device"):  # forward and backward
        assert received(compiled.as_text(), devices, tensor) == {k: 2 * n for k, n in formula.items()}


def check_key(mesh, drop) -> None:
    """Any tokens are dropped where a key says so: as many, but others."""
    x, params = arguments()
    outputs = {}
    for name, key in {"last": None, "any": jax.random.key(5)}.items():
        options = DROPS[drop] | {"key": key}
        outputs[name] = jax.jit(inside(FOLDINGS["copies"], options, mesh))(x, params)
    (last, _, load), (any_, _, same) = outputs.values()
    np.testing.assert_array_equal(load.tokens, same.tokens)
    assert float(load.dropped) > 0
    assert not np.allclose(last, any_)


if __name__ == "__main__":
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    if sys.argv[1:] == ["key"]:
        check_key(mesh, "by device")
        check_key(mesh, "over all")
    else:
        form, name, drop = sys.argv[1:]
        check(mesh, {"inside": inside, "outside": outside}[form], name, drop)
