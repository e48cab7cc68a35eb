"""Run by test_moments.py on eight devices: what a compiled update of an optimizer sends."""

import sys

import jax

import frugax
from experiments.trainer.state import init_state
from frugax import optim
from frugax.planner.hlo import KINDS
from frugax.planner.program import Computation, Instruction, Program, parse
from tests.parallel.steps import layout_of

RULES = {
    "adam_8bit": lambda: optim.adam_8bit(1e-2),
    "galore": lambda: optim.galore(1e-2, rank=12),
    "q_galore": lambda: optim.q_galore(1e-2, rank=12),
    "apollo": lambda: optim.apollo(1e-2, rank=12),
    "frugal": lambda: optim.frugal(1e-2),
}
MOMENTS = (".mu", ".nu", ".moments")
SAME = {"copy", "bitcast", "convert", "reshape", "transpose", "parameter", "tuple", "get-tuple-element"}


def source(program: Program, computation: Computation, name: str) -> Instruction:
    """The instruction that makes an array's numbers; others only copy, widen or reorder them."""
    x = computation.instructions[name]
    while len(x.operands) == 1:
        inner = program.computations[x.called("calls")[0]].instructions if x.opcode == "fusion" else {}
        alone = x.opcode == "fusion" and {y.opcode for y in inner.values()} <= SAME
        if x.opcode == "get-tuple-element" or not (alone or x.opcode in SAME):
            break
        x = computation.instructions[x.operands[0]]
    return x


def main(name: str, width: str) -> None:
    layout = layout_of(8, fsdp=4, tensor=2, zero=3)
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 4}, {"expand": 3.0})
    sizes = 2 * int(width), int(width)
    module = frugax.layers.Decoder(*sizes, (block,), 2, tie_embeddings=False, backend="xla")
    optimizer = RULES[name]()
    state = layout.abstract(lambda: init_state(module, optimizer, 0, 0.0))
    params, moments = state.params, state.optimizer
    places = jax.tree.map(lambda x: x.sharding, (params, moments))
    update = jax.jit(optimizer.update, out_shardings=places, keep_unused=True)
    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        program = parse(update.lower(params, moments, params).compile().as_text())
    entry = program.computations[program.entry]
    before = len(jax.tree.leaves(params))  # arguments are gradients, state, params; results updates, state
    of_moments = {
        before + i
        for i, (path, x) in enumerate(jax.tree.leaves_with_path(moments))
        if any(word in jax.tree_util.keystr(path) for word in MOMENTS) and x.ndim > 1
    }
    root = entry.instructions[entry.root]
    held = {
        x.name
        for x in entry.instructions.values()
        if x.opcode == "parameter" and int(x.literal) in of_moments
    }
    assert len(held) == len(of_moments) > 4
    held |= {source(program, entry, root.operands[i]).name for i in of_moments}
    sent = [x for x in entry.instructions.values() if x.opcode.removesuffix("-start") in KINDS]
    assert sent
    found = [x for x in sent if {x.name, *(source(program, entry, y).name for y in x.operands)} & held]
    assert not found, [f"{x.opcode} {x.shape} of {x.operands}" for x in found]


main(*sys.argv[1:])
