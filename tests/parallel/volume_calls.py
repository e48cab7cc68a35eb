"""Run by test_volumes.py on eight devices: bytes of state and of collectives, against papers' formulas."""

import sys
from math import isclose

import jax
from flax import traverse_util

import frugax
from tests.parallel.steps import compile_step

BLOCK = frugax.layers.Block("SlidingWindowAttention", "GLU", {"heads": 4, "window": 8}, {"expand": 2.0})
N = 8


def payload(step, *kinds: str, least: int = 0) -> int:
    """Bytes of the arrays that collectives of these kinds gather or reduce in a step."""
    return sum(
        c.payload_bytes * c.times for c in step.collectives if c.kind in kinds and c.payload_bytes >= least
    )


def shared_bytes(step) -> int:
    """Bytes of the matrices of layers, which are all that the axis "fsdp" shares in so small a model."""
    return sum(4 * x.size for x in jax.tree.leaves(step.state.params["layers"]) if x.ndim == 3)


def zero():
    """Bytes of a param: 12 on each device, 4 + 8/N with stages 1 and 2, 12/N with stage 3. Stage 2 shares the
    gradient's 4 bytes too. Stages 1 and 2 gather each param once, and stage 3 twice, at its uses."""
    none, one, two, three = (compile_step(BLOCK, fsdp=N, zero=stage) for stage in range(4))
    P, shared = none.params, shared_bytes(none)
    for step, formula in ((none, 12), (one, 4 + 8 / N), (two, 4 + 8 / N), (three, 12 / N)):
        found = step.program.memory_analysis().argument_size_in_bytes / P
        whole = (12 - formula) * (1 - shared / 4 / P)  # of embeddings and norms, which no axis shares
        assert formula + whole < found < formula + whole + 0.03, (found, formula, whole)
    temporary = [step.program.memory_analysis().temp_size_in_bytes for step in (one, two)]
    assert isclose(temporary[0] - temporary[1], shared * (1 - 1 / N), rel_tol=0.1), temporary
    for step, times in ((none, 0), (one, 1), (two, 1), (three, 2)):
        assert payload(step, "all-gather") == times * shared, times
        assert shared < payload(step, "all-reduce") < shared + 4 * P * 0.1  # of gradients
        assert not payload(step, "all-to-all", "collective-permute")  # activations stay where they are


def tensor():
    """Each mixer of a layer has one sum over the tensor axis forward and one backward, of its activations;
    those of a parallel block are sent together. Apart from them only params travel: queries, keys and values,
    gates, which lie side by side in a matrix."""
    params = []
    for block, time, messages in ((BLOCK, 32, 4), (BLOCK, 64, 4), (PARALLEL, 32, 2)):
        step = compile_step(block, data=2, tensor=4, rows=8, time=time, width=32, repeats=2)
        inside = [c for c in step.collectives if c.axes == ("tensor",) and c.times == 2]
        sums = [c for c in inside if c.kind == "all-reduce"]
        x = 8 // 2 * time * 32 * 4
        assert [c.payload_bytes for c in sums] == [4 * x // messages] * messages, sums
        assert all(c.wire_bytes == 2 * 3 / 4 * c.payload_bytes for c in sums), sums
        params.append(sum(c.wire_bytes for c in inside if c.kind != "all-reduce"))
    device = 4 * 32 * (3 * 32 + 4 * 32) // 4  # bytes that a device has of the two matrices that hold several
    assert params[0] == params[1] == params[2] < 5 * device, (params, device)


def moments():
    """An 8-bit step, on matrices whose shares hold whole groups of codes, sends neither codes nor scales."""
    mesh = frugax.parallel.make_mesh(data=1, fsdp=4, tensor=2)
    sizes = {
        "mixer/qkv": (128, 1536),
        "mixer/out": (512, 128),
        "channel/gate_in": (128, 1024),
        "channel/out": (512, 128),
    }
    layers = {name: {"kernel": jax.ShapeDtypeStruct((2, *size), "float32")} for name, size in sizes.items()}
    tree = {"layers": {"block_0": traverse_util.unflatten_dict(layers, sep="/")}}
    tree["embedding"] = jax.ShapeDtypeStruct((512, 128), "float32")
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    places = frugax.parallel.shardings(tree, mesh)
    params = jax.tree.map(put, tree, places)
    for optimizer in (frugax.optim.adam_8bit(1e-3), frugax.optim.lion_8bit(1e-3)):
        state = jax.eval_shape(optimizer.init, tree)
        of_state = frugax.parallel.state_shardings(state, tree, mesh)
        with jax.set_mesh(mesh):
            step = jax.jit(optimizer.update, out_shardings=(places, of_state))
            program = step.lower(params, jax.tree.map(put, state, of_state), params).compile()
        assert "s8[" in program.as_text() or "u8[" in program.as_text()
        sent = [c.payload_bytes for c in frugax.planner.collectives(program.as_text(), mesh)]
        assert max(sent, default=0) < 1024, sent


PARALLEL = frugax.layers.Block(
    "SlidingWindowAttention", "GLU", {"heads": 4, "window": 8}, {"expand": 2.0}, parallel=True
)

if __name__ == "__main__":
    {"zero": zero, "tensor": tensor, "moments": moments}[sys.argv[1]]()
