"""Scans over images against loops in numpy, the blocks' formulas, and images of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.models.vision_mamba import merge_patches
from tests.errors import assert_close


def filled(module, x):
    """Random parameters, far from what they start as."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.1, 0.4, p.shape), p.dtype), shapes)


def paths(scan, H, W, stride):
    """The pixels that each scan visits, in order, as the papers draw them."""
    if scan == "cross":
        rows = [(r, c) for r in range(H) for c in range(W)]
        columns = [(r, c) for c in range(W) for r in range(H)]
        return [rows, columns, rows[::-1], columns[::-1]]
    found = []
    for j in range(stride):
        for i in range(stride):
            by_rows = [(r, c) for r in range(i, H, stride) for c in range(j, W, stride)]
            found.append(sorted(by_rows, key=lambda p: p[::-1]) if len(found) % 2 else by_rows)
    return found


@pytest.mark.parametrize(("H", "W", "stride"), [(5, 3, 2), (7, 8, 3)])
def test_an_atrous_scan_covers_every_pixel_once(H, W, stride):
    """As many tokens as pixels, where "cross" scans four times as many; what pads an image is no token."""
    for scan, times in (("atrous", 1), ("cross", 4)):
        visits = [pixel for path in paths(scan, H, W, stride) for pixel in path]
        assert sorted(visits) == sorted(times * [(r, c) for r in range(H) for c in range(W)])
    pixels = 1 + jnp.arange(H * W, dtype=jnp.float32).reshape(1, H, W, 1)
    got = np.asarray(frugax.kernels.paths_2d(pixels, scan="atrous", step=stride))[:, 0, :, 0]
    want = [[r * W + c + 1 for r, c in path] for path in paths("atrous", H, W, stride)]
    assert [[int(p) for p in row if p] for row in got] == want


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, p):
    y = x - x.mean(-1, keepdims=True)
    return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def depthwise(x, p):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    H, W = x.shape[1:3]
    taps = p["kernel"][:, :, 0]
    out = sum(padded[:, i : i + H, j : j + W] * taps[i, j] for i in range(3) for j in range(3))
    return out + p.get("bias", 0)


def scan_by_hand(p, x, scan, stride, N, R):
    u, z = np.split(x @ p["in_gate"]["kernel"], 2, axis=-1)
    u = silu(depthwise(u, p["conv"]))
    y = np.zeros_like(u)
    for k, path in enumerate(paths(scan, *x.shape[1:3], stride)):
        h = np.zeros((x.shape[0], u.shape[-1], N))
        for r, c in path:
            now = u[:, r, c]
            low, B, C = np.split(now @ p["dt_B_C"][k], [R, R + N], axis=-1)
            dt = np.log1p(np.exp(low @ p["dt"][k] + p["dt_bias"][k]))
            h = np.exp(dt[..., None] * -np.exp(p["A_log"][k])) * h + (dt * now)[..., None] * B[:, None]
            y[:, r, c] += np.einsum("ben,bn->be", h, C) + p["D"][k] * now
    return (layer_norm(y, p["norm"]) * silu(z)) @ p["out"]["kernel"]


@pytest.mark.parametrize(("scan", "stride"), [("cross", 2), ("atrous", 2), ("atrous", 3)])
def test_the_scan_is_a_loop_over_pixels(scan, stride):
    with jax.enable_x64(True):
        args = {"stride": stride, "state_size": 3, "dt_rank": 2, "expand": 1.5}
        module = frugax.layers.SelectiveScan2D(scan, **args, param_dtype=jnp.float64)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 6)))
        variables = filled(module, x)
        y = jax.jit(module.apply)(variables, x)
        p = jax.tree.map(np.asarray, variables["params"])
        assert_close(y, scan_by_hand(p, np.asarray(x), scan, stride, 3, 2), "float64")


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x)))


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def weighed(x, p, act, normed):
    mean = (layer_norm(x, p["norm"]) if normed else x).mean((1, 2), keepdims=True)
    return x / (1 + np.exp(-dense(act(dense(mean, p["squeeze"])), p["excite"])))


def vss(p, x):
    return with_mlp(p, x + scan_by_hand(p["scan"], layer_norm(x, p["norm"]), "cross", 2, 2, 1))


def evss(p, x):
    normed = layer_norm(x, p["norm"])
    scanned = scan_by_hand(p["scan"], normed, "atrous", 2, 2, 1)
    local = gelu(layer_norm(depthwise(normed, p["conv"]), p["conv_norm"]))
    local = dense(local, p["conv_out"])
    scanned, local = (weighed(y, p["weigh"], gelu, normed=True) for y in (scanned, local))
    return with_mlp(p, x + scanned + local)


def with_mlp(p, x):
    return x + dense(gelu(dense(layer_norm(x, p["mlp_norm"]), p["mlp"]["in"])), p["mlp"]["out"])


def inverted_residual(p, x):
    y = np.maximum(layer_norm(dense(x, p["in"]), p["in_norm"]), 0)
    y = np.maximum(layer_norm(depthwise(y, p["conv"]), p["conv_norm"]), 0)
    y = weighed(y, p["weigh"], lambda y: np.maximum(y, 0), normed=False)
    return x + layer_norm(dense(y, p["out"]), p["out_norm"])


def test_a_vss_block_is_its_formula():
    with jax.enable_x64(True):
        module = frugax.layers.VSS({"state_size": 2, "dt_rank": 1}, mlp_expand=2, param_dtype=jnp.float64)
        image = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 8)))
        variables = filled(module, image)
        y = jax.jit(module.apply)(variables, image)
        p = jax.tree.map(np.asarray, variables["params"])
        assert_close(y, vss(p, np.asarray(image)), "float64")


def test_efficient_vmamba_is_its_formula():
    """The whole model on images whose size nothing divides: patches, both kinds of blocks, mean and head."""
    blocks = ("EVSS", "InvertedResidual")
    args = {"state_size": 2, "dt_rank": 1}
    with jax.enable_x64(True):
        model = frugax.layers.VisionMamba(
            5, (8, 10), (1, 2), blocks, patch=2, scan_args=args, mlp_expand=2, param_dtype=jnp.float64
        )
        images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 11, 2)))
        variables = filled(model, images)
        logits = jax.jit(model.apply)(variables, images)
        p, x = jax.tree.map(np.asarray, variables["params"]), np.asarray(images)
        for stage, (block, depth) in enumerate([(evss, 1), (inverted_residual, 2)]):
            x = layer_norm(dense(patches_by_hand(x), p[f"merge_{stage}"]), p[f"merge_norm_{stage}"])
            for i in range(depth):
                x = block(jax.tree.map(lambda a, i=i: a[i], p[f"stage_{stage}"]["block"]), x)
    assert_close(logits, dense(layer_norm(x, p["norm"]).mean((1, 2)), p["head"]), "float64")


def patches_by_hand(x):
    """Each 2 x 2 pixels as one, row by row, with zeros beyond the image."""
    B, H, W, C = x.shape
    out = np.zeros((B, -(-H // 2), -(-W // 2), 4 * C))
    for r, c in np.ndindex(H, W):
        place = (r % 2 * 2 + c % 2) * C
        out[:, r // 2, c // 2, place : place + C] = x[:, r, c]
    return out


def test_patches():
    image = jnp.arange(3 * 5).reshape(1, 3, 5, 1)
    merged = merge_patches(image, 2)
    assert merged.shape == (1, 2, 3, 4)
    assert merged[0, 0, 1].tolist() == [2, 3, 7, 8]
    assert merged[0, 1, 2].tolist() == [14, 0, 0, 0]


@pytest.mark.full
def test_a_classifier_of_odd_images_has_every_gradient():
    blocks = ("EVSS", "VSS", "InvertedResidual")
    model = frugax.layers.VisionMamba(5, (8, 10, 12), (2, 1, 1), blocks, patch=2, scan_args={"state_size": 2})
    x = jax.random.normal(jax.random.key(1), (3, 13, 9, 2))
    variables = model.init(jax.random.key(0), x)
    assert variables["params"]["stage_0"]["block"]["scan"]["A_log"].shape == (2, 4, 16, 2)

    def loss(variables, x):
        logits = model.apply(variables, x)
        assert logits.shape == (3, 5)
        return jnp.sum(jnp.sin(logits))

    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)):
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 0, path


@pytest.mark.full
def test_half_precision_in_half_precision_out():
    x = jax.random.normal(jax.random.key(1), (1, 3, 2, 8))
    module = frugax.layers.SelectiveScan2D(state_size=2)
    variables = module.init(jax.random.key(0), x)
    y = jax.jit(module.apply)(variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    # Eight roundings in a row: x, the projection, convolution, dt, the scan, its norm, the gate, the product.
    # Each is half a unit at most, and they add up as their squares do.
    assert_close(y, jax.jit(module.apply)(variables, x), jnp.bfloat16, times=2)
    assert (
        jax.eval_shape(frugax.layers.EVSS().init_with_output, jax.random.key(0), y)[0].dtype == jnp.bfloat16
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "classes: got 0"),
        ({"patch": 0}, "patch: got 0"),
        ({"depths": (1, 0)}, r"depths: got \(1, 0\)"),
        ({"depths": (1,)}, r"widths, depths, blocks: got widths \(8, 12\), depths \(1,\)"),
        ({"blocks": ("EVSS", "ViT")}, "blocks: got 'ViT'; expected one of EVSS, VSS, InvertedResidual"),
        ({"scan_args": {"stride": 0}}, "stride: got 0"),
        ({"scan_args": {"state_size": 0}}, "state_size: got 0"),
        ({"scan_args": {"scan": "spiral"}}, "scan: got 'spiral'; expected 'cross' or 'atrous'"),
    ],
)
def test_bad_input(arguments, message, unchecked_types):
    fits = {"classes": 3, "widths": (8, 12), "depths": (1, 1), "blocks": ("EVSS", "VSS"), "patch": 2}
    model = frugax.layers.VisionMamba(**(fits | arguments))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))


def test_images_that_cannot_be_right():
    model = frugax.layers.VisionMamba(3, (8,), (1,), ("EVSS",))
    for x in (jnp.ones((8, 8, 1)), jnp.ones((1, 0, 8, 1)), jnp.ones((1, 8, 8, 1), jnp.int32)):
        with pytest.raises(ValueError, match=r"x: got .* expected floating .batch, height, width, channels."):
            jax.eval_shape(model.init, jax.random.key(0), x)
