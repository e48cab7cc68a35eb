"""The decoder: one call for training, prefill, decoding and packed rows, and depth as a scan over data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

import frugax
from frugax.layers import Block, Decoder
from frugax.layers.block import BlockLayer
from tests.errors import assert_close, bound, error

from ..layers.calls import Calls, zero_rows

V, D = 11, 8

GLA = Block("GatedLinearAttention", "GLU", {"heads": 2, "conv_width": 3, "gate_rank": 3})
# One block of every kind of state, norm and argument that differs by layer.
MIXED = (
    Block("HGRN2", "MLP", {"heads": 2}, norm="LayerNorm"),
    frugax.layers.transnormer_block(heads=2),
    Block("SlidingWindowAttention", "RWKVChannel", {"heads": 2, "window": 3}, {"expand": 1}),
)


# Two of them, with a state of the channel mixer and arguments that differ by layer.
PAIR = (MIXED[0], MIXED[2])

together = pytest.mark.xdist_group("decoder of mixed blocks")


def make(blocks=(GLA,), repeats=2, *, batch=2, time=13, dtype=jnp.float32, **more):
    """(model, variables, tokens) with parameters away from zeros and ones."""
    model = Decoder(
        V, D, blocks, repeats, dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32), **more
    )
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(V, size=(batch, time)), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return (
        model,
        jax.tree.map(lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), p.dtype), shapes),
        tokens,
    )


def gradients(apply, variables):
    def loss(variables):
        logits = apply(variables)
        cotangent = np.random.default_rng(2).standard_normal(logits.shape)
        return jnp.vdot(logits, jnp.asarray(cotangent, logits.dtype)), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    return {"logits": logits, "grads": grads}


@functools.cache
def mixed():
    """The compiled calls of a decoder of mixed blocks, in float64."""
    model, variables, tokens = make(PAIR, time=3 + 8, dtype=jnp.float64)
    # The first document of each row goes on with that of the 3 tokens before the call.
    ids = jnp.array([[7, 7, 2, 7, 7, 7, 7, 7], [0, 0, 0, 0, 0, 1, 1, 1]])

    def call(variables, tokens, state=None, segment_ids=None):
        if state is not None:
            last = None if segment_ids is None else segment_ids[:, 0]
            state = frugax.layers.DecoderState(state, last)
        logits, state = model.apply(variables, tokens, state, segment_ids)
        return logits, state.layers

    return model, Calls(call, variables, tokens, ids, functools.partial(zero_rows, axis=1))


@together
def test_whole_is_token_by_token():
    with jax.enable_x64(True):
        _, mine = mixed()
        none = jnp.zeros(mine.ids.shape, bool)
        out, grads = mine.token_by_token(mine.now, mine.nothing_read, none, mine.cotangents())
        got, got_grads = mine.whole(mine.now)
        assert_close(got, out, "float64", name="whole")
        assert_close(got_grads[0], grads[0], "float64", name="gradients")


@together
def test_packed_is_token_by_token_wherever_calls_are_cut():
    with jax.enable_x64(True):
        model, mine = mixed()
        state = mine.before()
        want = mine.token_by_token(mine.now, state, mine.starts(), mine.cotangents())
        assert_close(mine.packed(mine.now, state), want, "float64", name="packed")

        # After 4 tokens a document goes on in both rows; another id at a cut would start afresh.
        apply = jax.jit(model.apply)
        logits, before = want[0][0], frugax.layers.DecoderState(state, mine.ids[:, 0])
        first, middle = apply(mine.variables, mine.now[:, :4], before, mine.ids[:, :4])
        assert_close(first, logits[:, :4], "float64", name="first")
        second, _ = apply(mine.variables, mine.now[:, 4:], middle, mine.ids[:, 4:])
        assert_close(second, logits[:, 4:], "float64", name="second")
        # The next call's first token has another id in row 0: its document starts with the call.
        other = mine.ids.at[0, 4:].set(9)
        second, _ = apply(mine.variables, mine.now[:, 4:], middle, other[:, 4:])
        starts = jnp.zeros((2, 4), bool).at[0, 0].set(True).at[1, 1].set(True)
        afresh, _ = mine.token_by_token(mine.now[:, 4:], middle.layers, starts)
        assert_close(second, afresh, "float64", name="afresh")
        # A call without ids goes on with the last document.
        logits, _ = apply(mine.variables, mine.now[:, 4:], middle)
        want, _ = mine.token_by_token(mine.now[:, 4:], middle.layers, jnp.zeros((2, 4), bool))
        assert_close(logits, want, "float64", name="without ids")


@pytest.mark.full
@pytest.mark.parametrize("blocks", [(GLA,), MIXED], ids=["gla", "mixed"])
def test_packed_is_separate(blocks):
    model, variables, tokens = make(blocks)
    ids = jnp.array([np.repeat([7, 2, 7], (3, 1, 9)), np.repeat([0, 1, 0], (9, 3, 1))])
    documents = {3: [(0, 0), (1, 9)], 1: [(0, 3), (1, 12)], 9: [(0, 4), (1, 0)]}

    def separate(variables):
        rows = [{}, {}]
        for length, places in documents.items():
            logits, _ = model.apply(variables, jnp.stack([tokens[r, s : s + length] for r, s in places]))
            for y_TV, (row, start) in zip(logits, places, strict=True):
                rows[row][start] = y_TV
        return jnp.stack([jnp.concatenate([row[start] for start in sorted(row)]) for row in rows])

    want = gradients(separate, variables)
    packed = gradients(lambda v: model.apply(v, tokens, segment_ids=ids)[0], variables)
    assert_close(packed, want, jnp.float32, name="packed")


def test_the_scan_over_depth_is_a_loop_over_layers():
    blocks = (
        Block("HGRN2", "RWKVChannel", {"heads": 2}, {"expand": 1}, norm="LayerNorm"),
        Block("LightningAttention", None, {"heads": 2}, norm="RMSNorm"),
    )
    model, variables, tokens = make(blocks, repeats=2, time=5)
    params, depth = variables["params"], 4
    steps = np.exp(np.asarray(params["ForgetFloors"]["logits"], np.float64))
    steps /= steps.sum(0)
    floors = np.cumsum(steps, axis=0) - steps[0]

    def loop(variables):
        params = variables["params"]
        x = params["embedding"][tokens]
        for layer in range(depth):
            repeat, i = divmod(layer, len(blocks))
            mine = jax.tree.map(lambda p, repeat=repeat: p[repeat], params["layers"][f"block_{i}"])
            fraction = {"fraction": jnp.float32(layer / 3)}
            by_layer = [({"floor": jnp.float32(floors[layer])}, fraction), (fraction, {})][i]
            module = BlockLayer(blocks[i], depth, jnp.float32, jnp.float32, None)
            x, *_ = module.apply({"params": mine}, x, None, by_layer, {}, None)
        return nn_rms(x, params["norm"]["weight"]) @ params["embedding"].T

    got = gradients(lambda v: model.apply(v, tokens)[0], variables)
    want = gradients(loop, variables)
    floor_grads = got["grads"]["params"].pop("ForgetFloors")
    want["grads"]["params"].pop("ForgetFloors")  # the loop above takes the floors as constants
    assert_close(got, want, jnp.float32)
    assert np.any(np.asarray(floor_grads["logits"]))


def nn_rms(x, weight):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight[None, None]


def test_floors_start_at_zero_and_rise_with_depth():
    from frugax.layers.modules.over_depth import ForgetFloors

    floors = ForgetFloors().init_with_output(jax.random.key(0), 4, 3)[0]["floor"]
    assert floors[:, 0].tolist() == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("remat", marks=together),
        pytest.param("unroll", marks=[together, pytest.mark.full]),
    ],
)
def test_remat_and_unrolling_change_no_number(name):
    with jax.enable_x64(True):
        model, mine = mixed()
        of_y, of_state = mine.cotangents()
        (want, _), (grads, _, _) = mine.whole(mine.now, (of_y, jax.tree.map(jnp.zeros_like, of_state)))
        other = jax.jit(model.clone(**{name: True}).apply)
        logits, pull = jax.vjp(lambda v: other(v, mine.now)[0], mine.variables)
        assert_close((logits, pull(of_y)[0]), (want, grads), "float64", name=name)

        def remats(m):  # kernels have some of their own
            return str(jax.make_jaxpr(m.apply)(mine.variables, mine.now)).count("remat")

        assert remats(model.clone(remat=True)) > remats(model)


@pytest.mark.parametrize(
    "blocks",
    [(Block(GLA.mixer, None, GLA.mixer_args),), pytest.param(MIXED, marks=pytest.mark.full)],
    ids=["gla", "mixed"],
)
def test_exports_with_any_batch_and_time(blocks, unchecked_types):
    """One exported program serves prompts of any size, and another with a state decodes any batch."""
    model, variables, tokens = make(blocks, repeats=1)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), variables)
    B, T = export.symbolic_shape("b, t")
    apply, tokens = jax.jit(model.apply), np.asarray(tokens)
    whole = export.export(apply)(shapes, jax.ShapeDtypeStruct((B, T), jnp.int32))
    for batch, time in ((2, 13), (1, 5)):
        part = tokens[:batch, :time]
        want, state = apply(variables, part)
        got, got_state = whole.call(variables, part)
        assert_close(got, want, jnp.float32)
    states = jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((B, 3), jnp.int32))[1]
    step = export.export(apply)(shapes, jax.ShapeDtypeStruct((B, 1), jnp.int32), states)
    want, _ = apply(variables, tokens[:1, 5:6], state)
    assert_close(step.call(variables, tokens[:1, 5:6], got_state)[0], want, jnp.float32)


def test_depth_adds_no_program():
    def equations(repeats):
        model, variables, tokens = make(repeats=repeats)
        return str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, tokens)[0].sum()))(variables)).count("=")

    assert equations(2) == equations(7)


def test_tied_embeddings_are_the_head():
    model, variables, tokens = make()
    untied = model.clone(tie_embeddings=False)
    head = {"params": {**variables["params"], "head": variables["params"]["embedding"]}}
    shapes = jax.eval_shape(untied.init, jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, head)
    tied_logits = np.asarray(jax.jit(model.apply)(variables, tokens)[0])
    apply = jax.jit(untied.apply)
    assert_close(apply(head, tokens)[0], tied_logits, jnp.float32)
    head["params"]["head"] = -np.asarray(head["params"]["head"])
    assert_close(apply(head, tokens)[0], -tied_logits, jnp.float32)


def test_bfloat16_layers_give_float32_logits():
    model, variables, tokens = make()
    want, _ = jax.jit(model.apply)(variables, tokens)
    logits, state = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, tokens)
    assert logits.dtype == jnp.float32
    # Two layers of two halves, each a dozen roundings deep, add up in the stream like independent errors.
    assert_close(logits, want, jnp.bfloat16, times=12 * 4**0.5)
    half = model.clone(dtype=jnp.bfloat16)
    again, _ = jax.eval_shape(half.apply, variables, tokens[:, :1], state)
    assert again.dtype == jnp.float32


def test_how_a_decoder_is_born():
    """Near-uniform predictions, quiet outputs, one set of parameters a layer."""
    model = Decoder(256, 64, (Block("RWKV6", None), Block("MLGRU", "MLP")), repeats=4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(256, size=(2, 32)))
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    @jax.jit
    def loss(params, tokens):
        logits, _ = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    assert abs(float(loss(params, tokens)) - np.log(256)) < 0.1
    out = np.asarray(params["layers"]["block_1"]["channel"]["out"]["kernel"])  # [repeats, hidden, width]
    assert abs(float(np.std(out)) / (256 * 2 * 8) ** -0.5 - 1) < 0.05
    assert error(out[0], out[1]) > 1
    decay = params["layers"]["block_0"]["mixer"]["decay"]  # starts as its layer of RWKV-6 does
    n, fractions = np.arange(64) / 63, np.arange(0, 8, 2) / 7
    assert_close(decay, np.stack([-6 + 5 * n ** (0.7 + 1.3 * f) for f in fractions]), jnp.float32)


def test_it_learns():
    model = Decoder(V, 12, (Block("MLGRU"),), repeats=2)
    tokens = jnp.tile(jnp.array([[1, 5, 2, 8, 3]]), (2, 5))
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    optimizer = optax.adam(2e-2)

    @jax.jit
    def step(carry, _):
        variables, opt_state = carry

        def loss_fn(variables):
            logits, _ = model.apply(variables, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(variables)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(variables, updates), opt_state), loss

    _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=60))((variables, optimizer.init(variables)))
    assert losses[0] > 2
    assert losses[-1] < 0.2


def test_nnx_bridge_trains_a_step():
    model = Decoder(V, D, (Block("MLGRU", None),), repeats=2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(V, size=(2, 5)))
    wrapped = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(tokens)
    optimizer = nnx.Optimizer(wrapped, optax.adam(1e-2), wrt=nnx.Param)

    def loss_fn(wrapped):
        logits, _ = wrapped(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = nnx.jit(nnx.value_and_grad(loss_fn))(wrapped)
    optimizer.update(wrapped, grads)
    assert nnx.jit(loss_fn)(wrapped) < loss


@pytest.mark.nan
def test_ids_outside_the_vocabulary_show():
    model, variables, tokens = make(batch=2, time=5)
    apply, tokens = jax.jit(model.apply), np.array(tokens)
    for bad in (V, -1):
        tokens[1, 2] = bad
        logits = np.asarray(apply(variables, tokens)[0])
        assert np.isnan(logits[1, 2:]).all()
        assert np.isfinite(logits[0]).all()


@pytest.mark.parametrize(
    "blocks", [MIXED[2:], pytest.param(MIXED, marks=pytest.mark.full)], ids=["window", "mixed"]
)
def test_prompts_of_several_lengths_go_on_where_each_ends(blocks):
    """Padded prompts, and prompts packed in a row: the next token's logits are those of each prompt alone."""
    model, variables, tokens = make(blocks, repeats=1, time=6)
    lengths = jnp.array([6, 4])
    ids = jnp.array([[3, 3, 3, 3, 5, 5], [8, 8, 9, 9, 9, 9]])
    more = jnp.array([[1], [2]])

    @jax.jit
    def run(variables, tokens):
        padded, state = model.apply(variables, tokens.at[1, 4:].set(-1), lengths=lengths)
        goes_on, _ = model.apply(variables, more, state)
        packed, states = model.apply(variables, tokens, segment_ids=ids, segment_states=2)
        rows = states.unpacked()
        each, _ = model.apply(variables, jnp.repeat(more, 2, axis=0), rows)
        none = {"segment_ids": jnp.full((4, 1), 7), "lengths": jnp.zeros(4, jnp.int32)}
        _, same = model.apply(variables, jnp.repeat(more, 2, axis=0), rows, **none)
        return padded, goes_on, packed, each, rows, same

    @jax.jit
    def alone(variables, tokens, more):
        logits, state = model.apply(variables, tokens)
        return logits[0], model.apply(variables, more, state)[0][0]

    padded, goes_on, packed, each, rows, same = run(variables, tokens)
    assert rows.last_segment.tolist() == [3, 5, 8, 9]
    jax.tree.map(np.testing.assert_array_equal, same, rows)  # no token was read, so no document began
    assert not np.asarray(padded[1, 4:]).any()
    for row, length in enumerate((6, 4)):
        want, then = alone(variables, tokens[row : row + 1, :length], more[row : row + 1])
        assert_close((padded[row, :length], goes_on[row]), (want, then), "float32")
    for n, (row, document) in enumerate(
        [(0, slice(0, 4)), (0, slice(4, 6)), (1, slice(0, 2)), (1, slice(2, 6))]
    ):
        want, then = alone(variables, tokens[row : row + 1, document], more[row : row + 1])
        assert_close((packed[row, document], each[n]), (want, then), "float32")


def test_channel_mixers_with_a_state_are_carried():
    """Finch whole: its channel mixing reads the last token, so its state crosses calls and starts afresh."""
    block = Block("RWKV6", "RWKVChannel", {"heads": 2, "mix_rank": 2, "decay_rank": 2}, {"expand": 1})
    model, variables, tokens = make((block,), time=3)
    apply = jax.jit(model.apply)
    _, state = apply(variables, tokens)
    assert [leaf.shape for leaf in jax.tree.leaves(state.layers[0].channel)] == [(2, 2, D)]
    first = np.asarray(tokens)[:, :1]
    logits, _ = apply(variables, first, state)
    forgotten = state.layers[0]._replace(channel=jax.tree.map(np.zeros_like, state.layers[0].channel))
    other, _ = apply(variables, first, state._replace(layers=(forgotten,)))
    assert error(other, logits) > 1e-3


def test_based_recalls_what_its_window_no_longer_sees():
    """Its layers alternate; the token 5 places back is beyond a window of 2 and both convolutions' taps."""
    blocks = frugax.layers.based_blocks(2, key_size=3, window=2)
    kinds = ["GatedConvolution", "LinearAttention", "SlidingWindowAttention", "GatedConvolution"]
    assert [block.mixer for block in blocks] == [*kinds, "GatedConvolution"]
    model, variables, tokens = make(blocks[1:3], repeats=1, batch=1, time=9)
    apply, changed = jax.jit(model.apply), np.array(tokens)
    changed[0, 3] = (changed[0, 3] + 1) % V
    logits, state = apply(variables, tokens)
    carried = sum(leaf.size for leaf in jax.tree.leaves(state.layers))
    assert carried == 2 * (1 + 3 + 6) * (D // 2 + 1) + 2 * D + 1  # features by values, a window, a length
    other, _ = apply(variables, changed)
    assert error(np.asarray(other)[0, -1], np.asarray(logits)[0, -1]) > 1e-4
    window, own = jax.jit(model.clone(blocks=blocks[2:3]).apply), with_block(variables, "block_1")
    alone, unseen = (np.asarray(window(own, ids)[0]) for ids in (tokens, changed))
    assert (alone[0, -1] == unseen[0, -1]).all()


def with_block(variables, name):
    """The variables of a decoder of one of the blocks alone."""
    params = variables["params"]
    return {"params": {**params, "layers": {"block_0": params["layers"][name]}}}


def test_blocks_are_values():
    one = Block("GatedLinearAttention", mixer_args={"heads": 2, "expand_k": 1.0})
    same = Block("GatedLinearAttention", mixer_args=(("expand_k", 1.0), ("heads", 2)))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Block("GatedLinearAttention", mixer_args={"heads": 4, "expand_k": 1.0})


def test_norms_take_their_arguments():
    """So large an epsilon that layers see almost nothing, add nothing, and the last norm is a division."""
    block = Block(mixer_args={"heads": 2}, norm="SimpleRMSNorm", norm_args={"epsilon": 1e12})
    model, variables, tokens = make((block,))
    logits, _ = model.apply(variables, tokens)
    embedding = np.asarray(variables["params"]["embedding"], np.float64)
    assert_close(logits, embedding[tokens] / 1e6 @ embedding.T, "float32")


class Mean(frugax.layers.Mixer):
    """A mixer of the user's own."""

    @nn.compact
    def mix(self, x, state, rows):
        return self.output(jnp.cumsum(x, axis=1), x.shape[-1]), state


def test_a_mixer_of_ones_own():
    model, variables, tokens = make((Block(Mean, "MLP"),))
    logits, _ = model.apply(variables, tokens)
    assert logits.shape == (2, 13, V)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "Attention"}, "mixer: got 'Attention'; expected one of .*GatedLinearAttention"),
        ({"mixer": GLA}, "mixer: got Block"),
        ({"channel": "Experts"}, "channel: got 'Experts'; expected one of GLU, MLP, MoE, RWKVChannel"),
        ({"norm": "BatchNorm"}, "norm: got 'BatchNorm'; expected one of RMSNorm"),
        (
            {"mixer_args": {"head": 4}},
            "mixer_args: GatedLinearAttention takes no 'head'; expected ternary, heads, expand_k",
        ),
        ({"mixer_args": {"dtype": jnp.bfloat16}}, "takes no 'dtype'"),
        ({"channel_args": {"width": 4}}, "channel_args: GLU takes no 'width'; expected expand, activation"),
        ({"norm_args": {"eps": 1e-5}}, "norm_args: RMSNorm takes no 'eps'; expected epsilon"),
        ({"channel": None, "channel_args": {"expand": 4}}, "channel_args: .* without a channel mixer"),
    ],
)
def test_blocks_that_cannot_be_right(arguments, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        Block(**arguments)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"repeats": 0}, "repeats: got 0"),
        ({"blocks": ()}, r"blocks: got \(\)"),
        ({"blocks": Block()}, "blocks: got Block.* a tuple of at least one"),
        ({"blocks": ("GatedLinearAttention",)}, "blocks: got .* a tuple of at least one"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
        ({"blocks": (Block(mixer_args={"heads": 5}),)}, r"heads: got 5; .* width \* expand_k = 8"),
        (
            {"blocks": (Block(channel_args={"activation": "tan"}),)},
            "activation: got 'tan'; expected one of 'silu'",
        ),
        ({"blocks": (Block(channel_args={"expand": 0}),)}, "expand: got 0"),
    ],
)
def test_decoders_that_cannot_be_right(attributes, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        Decoder(**{"vocab_size": V, "width": 16, **attributes}).init(
            jax.random.key(0), jnp.ones((1, 3), jnp.int32)
        )


def test_calls_that_cannot_be_right():
    model, variables, tokens = make(batch=2, time=3)
    for bad in (tokens[0], tokens[:, :0], tokens * 1.0):
        with pytest.raises(ValueError, match=r"tokens: got .* expected integers \[batch, time >= 1\]"):
            model.apply(variables, bad)
    with pytest.raises(ValueError, match=r"segment_ids: got int32\[2, 2\]; expected integers \[2, 3\]"):
        model.apply(variables, tokens, None, tokens[:, :2])
    _, state = model.apply(variables, tokens)
    with pytest.raises(
        ValueError,
        match=r"state: got 1 blocks of \[repeats, batch\] \[\(2, 2\)\]; expected 1 blocks of \(2, 1\)",
    ):
        model.apply(variables, tokens[:1], state)
    with pytest.raises(ValueError, match="state: got 1 blocks"):
        model.clone(blocks=(GLA, GLA)).apply(variables, tokens, state)


def test_errors_of_half_precision_could_be_seen():
    """The bounds used above are below what a wrong model gives."""
    model, variables, tokens = make()
    apply, tokens = jax.jit(model.apply), np.asarray(tokens)
    a, b = (apply(variables, ids)[0] for ids in (tokens, (tokens + 1) % V))
    assert error(a, b) > 12 * 2 * bound(jnp.bfloat16)


def test_a_parallel_block_adds_both_mixers_of_one_norm():
    block = Block("LinearAttention", "GLU", {"heads": 2}, parallel=True)
    model = Decoder(11, 8, (block,), backend="xla")
    tokens = jnp.array([[1, 5, 3, 7, 2]])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    params = jax.tree.map(lambda x: x[0], variables["params"]["layers"]["block_0"])
    assert set(params) == {"mixer", "mixer_norm", "channel"}

    @jax.jit
    def by_hand(variables, params):
        x = variables["params"]["embedding"][tokens]
        norm = lambda w, x: frugax.layers.RMSNorm().apply({"params": w}, x)  # noqa: E731
        normed = norm(params["mixer_norm"], x)
        scale = 2**-0.5
        mixer = frugax.layers.LinearAttention(heads=2, out_scale=scale, backend="xla")
        channel = frugax.layers.GLU(out_scale=scale)
        mixed, _ = mixer.apply({"params": params["mixer"]}, normed)
        x = x + mixed + channel.apply({"params": params["channel"]}, normed)
        return norm(variables["params"]["norm"], x) @ variables["params"]["embedding"].T

    logits, _ = jax.jit(model.apply)(variables, tokens)
    assert_close(logits, by_hand(variables, params), "float32")
