"""A small transformer of stacked blocks, and the tests' measures of memory."""

import jax
import jax.numpy as jnp

from frugax.optim.layerwise import compressed


def transformer(depth=8, width=32, time=16, batch=2, slim=False):
    """Params and a loss that scans over blocks; `slim` takes SlimFit's functions in the blocks."""
    keys = jax.random.split(jax.random.key(0), 7)

    def normal(key, *shape):
        return jax.random.normal(keys[key], shape) * shape[-2] ** -0.5

    params = {
        "embedding": normal(0, 19, width),
        "layers": {
            "up": normal(1, depth, width, 4 * width),
            "down": normal(2, depth, 4 * width, width),
            "qkv": normal(3, depth, width, 3 * width),
            "out": normal(4, depth, width, width),
            "scale": jnp.ones((depth, width)),
            "bias": jnp.zeros((depth, width)),
        },
        "head": normal(5, width, 19),
    }
    tokens = jax.random.randint(keys[6], (batch, time), 0, 19)
    future = jnp.triu(jnp.full((time, time), -1e9), 1)[None]
    turn = jnp.cos(jnp.arange(time * width).reshape(time, width) / 100.0)  # a constant of the scan

    def exact_norm(x, scale, bias):
        x = x - x.mean(-1, keepdims=True)
        return (
            x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-12) * scale[None, None]
            + bias[None, None]
        )

    def block(carry, w):
        h, count = carry  # an integer in the carry, too
        norm = compressed.layer_norm if slim else exact_norm
        gelu = compressed.gelu if slim else lambda x: jax.nn.gelu(x, approximate=False)
        q, k, v = jnp.split(norm(h, w["scale"], w["bias"]) @ w["qkv"], 3, axis=-1)
        q, k = q * turn[None], jnp.swapaxes(k * turn[None], 1, 2)
        if slim:
            mixed = compressed.softmax_matmul(compressed.matmul(q, k) * width**-0.5 + future, v)
        else:
            mixed = jax.nn.softmax(q @ k * width**-0.5 + future) @ v
        h = h + mixed @ w["out"]
        h = h + jnp.einsum("btf,fd->btd", gelu(norm(h, w["scale"], w["bias"]) @ w["up"]), w["down"])
        return (h, count + 1), h.mean()

    def loss(params):
        (h, count), means = jax.lax.scan(block, (params["embedding"][tokens], 0), params["layers"])
        scores = jax.nn.log_softmax(h @ params["head"])
        aimed = jnp.take_along_axis(scores, tokens[..., None], axis=-1)
        return -jnp.mean(aimed) + 0.1 * jnp.sum(means) + 0.0 * count

    return params, loss


def perceptron(depth=4, width=64):
    """A stack of residual layers with a head, and a loss that scans over them."""
    w = jax.random.normal(jax.random.key(0), (depth, width, width), jnp.float32) * width**-0.5
    params = {"layers": {"w": w, "b": jnp.zeros((depth, width), jnp.float32)}}
    params["head"] = jnp.ones(width, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (8, width), jnp.float32)

    def loss(params):
        def layer(h, w):
            return h + jnp.tanh(h @ w["w"] + w["b"][None]), None

        return jnp.mean((jax.lax.scan(layer, x, params["layers"])[0] @ params["head"] - 1) ** 2)

    return params, loss


def temporaries(f, *args, **options):
    """The bytes of temporaries of a compiled function."""
    compiled = jax.jit(f, **options).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes
