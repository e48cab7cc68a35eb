"""Pipelines in one program: the numbers of one device, the slots of the paper, memory whatever M is."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from experiments.trainer.pipeline import make_pipeline
from experiments.trainer.state import model_rngs
from frugax.parallel import pipeline_schedule, pipeline_slots, pipeline_timeline
from tests.devices import run_on_eight_devices
from tests.errors import assert_close, error
from tests.parallel.pipeline_calls import batch_shapes, config_of, module_of, step_of

SIZES = [(1, 3, 1), (2, 2, 1), (4, 8, 1), (4, 5, 1), (3, 1, 1), (2, 4, 2), (4, 8, 2), (4, 16, 4), (3, 6, 3)]
CALLS = "tests.parallel.pipeline_calls"
WIDE = {"dtype": "float64", "param_dtype": "float64"}


@pytest.mark.parametrize(("P", "M", "v"), SIZES)
@pytest.mark.parametrize("in_step", [False, True])
def test_slots_have_the_papers_bubble_and_hold_what_is_in_flight(P, M, v, in_step):
    schedule = pipeline_schedule(P, M, chunks=v, in_step=in_step)
    slots, held = pipeline_slots(schedule), pipeline_timeline(schedule).in_flight
    for passes, direction in ((slots.forward, "forward"), (slots.backward, "backward")):
        for rank, tasks in enumerate(schedule):
            at = passes.active[:, rank]
            found = list(zip(passes.chunk[at, rank], passes.microbatch[at, rank], strict=True))
            assert found == [task[1:] for task in tasks if task.direction == direction]
    assert slots.places <= max(held) * v  # the first rank's, who needs none for its first chunk
    assert slots.carried_places == max(held) * v
    if in_step and (v > 1 or M > 1):
        busy = slots.forward.active.any(1).sum(), slots.backward.active.any(1).sum()
        assert busy == (v * M + P - 1,) * 2  # of v M: a bubble of (P - 1) / (v M), whatever a pass takes
    if in_step and v == 1:
        assert held == tuple(min(2 * (P - 1 - rank) + 1, M) for rank in range(P))


def test_messages_wait_in_places_of_their_own():
    """Replayed with names for arrays: each pass reads the message of its own stage and microbatch, and a
    backward pass what its forward pass carried."""
    for P, M, v in SIZES:
        schedule = pipeline_schedule(P, M, chunks=v, in_step=True)
        slots = pipeline_slots(schedule)
        inputs = [[None] * slots.places for _ in range(P)]
        gradients = [[None] * slots.gradient_places for _ in range(P)]
        carried = [[None] * slots.carried_places for _ in range(P)]
        for s in range(len(slots.forward.active)):
            for passes, kept, step in ((slots.forward, inputs, 1), (slots.backward, gradients, -1)):
                sent = [None] * P
                for r in range(P):
                    if not passes.active[s, r]:
                        assert passes.carried[s, r] == -1
                        continue
                    number, m = int(passes.chunk[s, r]) * P + r, int(passes.microbatch[s, r])
                    if number:
                        assert inputs[r][passes.reads[s, r]] == (number, m)
                    if step < 0 and number < v * P - 1:
                        assert gradients[r][passes.reads_gradient[s, r]] == (number, m)
                    if step > 0:
                        carried[r][passes.carried[s, r]] = (number, m)
                    assert carried[r][passes.carried[s, r]] == (number, m)
                    sent[r] = (number + step, m)
                for r in range(P):
                    if passes.writes[s, r] >= 0:
                        kept[r][passes.writes[s, r]] = sent[(r - step) % P]


def test_a_pipeline_with_other_axes_trains_as_one_device_does():
    """Packed documents, two chunks on each of two stages, and biases of routers that go from part to part."""
    mesh = {"pipeline": 2, "expert": 2, "sequence": 2}
    run_on_eight_devices(CALLS, json.dumps(["split experts", 2, 2, mesh, {}]))


def test_stages_draw_what_the_whole_decoder_draws():
    """Three stages of two layers with jitter, and experts that choose at random among too many tokens."""
    args = {"experts": 4, "k": 2, "expand": 1.0, "dispatch": "gather", "capacity": 0.8, "jitter": 0.2}
    block = frugax.layers.Block("MLGRU", "MoE", (), args)
    model = frugax.layers.Decoder(8, 16, (block,), repeats=6, backend="xla")
    tokens = jnp.asarray(np.random.default_rng(0).integers(8, size=(2, 8)))
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    cut = frugax.models.decoder_stages(model, 3, lambda head, x, part: (x, {}))
    shared, layers = cut.split(params)

    @jax.jit
    def both(rngs):
        part = {"tokens": tokens, "segment_ids": None, "rngs": rngs}
        x, stage = cut.first(shared, part), jax.jit(cut.stage)
        for number in range(3):
            mine = jax.tree.map(lambda w, at=2 * number: w[at : at + 2], layers)
            x, *_ = stage(shared, mine, {}, x, part, number)
        (whole, _), _ = model.apply({"params": params}, tokens, hidden=True, rngs=rngs, mutable=["moe"])
        return cut.last(shared, x, part)[0], whole

    one, another = (both(model_rngs(jax.random.key(seed))) for seed in (1, 2))
    assert_close(*one, "float32")
    assert error(one[0], another[0]) > 1e-2


@pytest.mark.full
@pytest.mark.parametrize(
    ("block", "chunks", "accumulate", "mesh", "how"),
    [
        ("dense", 1, 1, {"pipeline": 2}, {}),
        ("dense", 1, 5, {"pipeline": 4, "data": 2}, {"tie_embeddings": False}),
        ("floors", 2, 4, {"pipeline": 2, "data": 2}, {"remat": "full"}),
        ("dense", 2, 8, {"pipeline": 4, "fsdp": 2}, {}),
        ("dense", 3, 2, {"pipeline": 2, "slice": 2}, {}),
        ("attention", 2, 4, {"pipeline": 2, "fsdp": 2, "tensor": 2}, {}),
        ("attention", 1, 8, {"pipeline": 8}, {"tie_embeddings": False}),
        ("attention", 1, 3, {"pipeline": 2, "data": 2, "tensor": 2}, {"tie_embeddings": False}),
        ("mamba", 2, 2, {"pipeline": 2, "fsdp": 2, "tensor": 2}, {}),
        ("floors", 2, 4, {"pipeline": 2, "fsdp": 4}, {}),
        ("pregated", 1, 4, {"pipeline": 4}, {}),
        ("experts", 1, 2, {"pipeline": 2, "fsdp": 2, "tensor": 2}, {}),
        ("choosing experts", 1, 2, {"pipeline": 2, "fsdp": 2, "tensor": 2}, {}),
        ("drawing experts", 2, 4, {"pipeline": 2, "data": 2}, {}),
        ("drawing experts", 1, 1, {"pipeline": 2, "fsdp": 2}, {"remat": "full"}),
        ("drawing experts", 1, 2, {"pipeline": 2, "sequence": 2, "tensor": 2}, {}),
        ("drawing experts", 1, 2, {"pipeline": 2, "slice": 2, "tensor": 2}, {}),
        ("split experts", 2, 4, {"pipeline": 2, "fsdp": 2, "expert": 2}, {}),
        ("split experts", 1, 2, {"pipeline": 2, "expert": 2, "tensor": 2}, {"remat": "full"}),
        ("attention", 1, 2, {"pipeline": 2, "sequence": 4}, {}),
        ("attention", 1, 2, {"pipeline": 2, "fsdp": 2, "sequence": 2}, {}),
        ("mamba", 2, 2, {"pipeline": 2, "sequence": 2, "tensor": 2}, {}),
        # One unit in the last places of float32 params moves these gradients by 1e-3.
        ("dense", 1, 2, {"pipeline": 2, "fsdp": 2, "sequence": 2}, WIDE),
        ("dense", 1, 3, {"pipeline": 2, "fsdp": 2, "tensor": 2}, {"low_bit": "fp8_current"}),
        ("attention", 1, 2, {"pipeline": 2, "sequence": 2}, {"low_bit": "fp8_current"}),
        ("dense", 1, 2, {"pipeline": 2}, {"low_bit": "nvfp4"}),
    ],
)
def test_pipelines_train_as_one_device_does(block, chunks, accumulate, mesh, how):
    run_on_eight_devices(CALLS, json.dumps([block, chunks, accumulate, mesh, how]))


@pytest.mark.full
def test_memory_follows_what_is_in_flight_and_a_run_goes_on_over_another_mesh():
    run_on_eight_devices(CALLS, '"memory"', '"resume"')


@pytest.mark.full
def test_inner_channels_stay_with_their_tokens():
    run_on_eight_devices(CALLS, '"inner"')


@pytest.mark.full
@pytest.mark.parametrize(
    ("chips", "mesh"),
    [
        ("v5e:2x2", {"pipeline": 4}),
        ("v5e:2x2", {"pipeline": 2, "fsdp": 2}),
        ("v5e:2x2", {"pipeline": 2, "tensor": 2}),
        ("v5e:2x4", {"pipeline": 2, "fsdp": 2, "tensor": 2}),
        ("v5e:2x2*2", {"pipeline": 2, "slice": 2, "tensor": 2}),
    ],
)
def test_a_step_compiles_for_tpu(chips, mesh):
    devices = frugax.planner.topology(chips).devices
    config = config_of(8, 4, 2, **mesh)
    config.data.sequence_length = 128
    module = module_of(config, "attention", width=128, dtype=jnp.bfloat16)
    _, _, _, compiled = step_of(config, module, devices, batch_shapes(config, 128))
    text = compiled.as_text()
    assert re.search(r" collective-permute(-start)?\(", text)
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_wrong_pipelines_are_named():
    shared, rows = jnp.ones(()), jnp.ones((4, 3))

    def run(schedule, mesh, layers=6, carried=None):
        frugax.parallel.pipeline_gradients(
            *(print, print, print, shared, jnp.ones(layers), rows),
            carried=carried,
            schedule=schedule,
            mesh=mesh,
        )

    mesh = jax.sharding.AbstractMesh((4,), ("pipeline",))
    with pytest.raises(ValueError, match=r"schedule: got 2 devices; expected as many as the mesh"):
        run(pipeline_schedule(2, 4), mesh)
    with pytest.raises(
        ValueError, match=r"layers: got 6; expected a multiple of 4 \(4 stages times 1 chunks"
    ):
        run(pipeline_schedule(4, 4), mesh)
    with pytest.raises(ValueError, match="carried: got 2; expected a multiple of 4"):
        run(pipeline_schedule(4, 4), mesh, layers=8, carried=jnp.ones(2))
    with pytest.raises(ValueError, match=r"microbatches: got \[4, 3\]; expected 8 in front"):
        run(pipeline_schedule(4, 8), mesh)
    with pytest.raises(ValueError, match="schedule: got tasks that wait for each other"):
        pipeline_slots([pipeline_schedule(1, 1)[0][::-1]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.repeats": 6}, "model.repeats: got 6; expected a multiple of 4, mesh.pipeline=2 times pip"),
        (
            {"accumulate": 3},
            "accumulate: got 3; expected a multiple of mesh.pipeline=2 for pipeline.chunks=2",
        ),
        ({"mesh.pipeline": 1}, "pipeline.chunks: got 2; expected 1 for mesh.pipeline=1"),
    ],
)
def test_wrong_configs_are_named(change, words):
    config = config_of(8, 4, 2, pipeline=2)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        make_pipeline(config, None)
