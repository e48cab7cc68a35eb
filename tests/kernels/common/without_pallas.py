"""Call every operation, forward and backward, by the backend named or by `none`: Pallas is not loaded."""

import sys

import jax
import jax.numpy as jnp

import frugax

k = frugax.kernels
backend = None if sys.argv[1] == "none" else sys.argv[1]
x_BTHD, x_BTD, row_BTN = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 8, 4)), jnp.ones((1, 8, 3))
steps_BTH, rates_DN = jnp.ones((1, 8, 2)), -jnp.ones((4, 3))
four = jnp.ones((4, 1, 8, 4)), -jnp.ones((4, 4, 3)), jnp.ones((4, 1, 8, 3)), jnp.ones((4, 1, 8, 3))
CALLS = {
    k.linear_attention: (x_BTHD, x_BTHD, x_BTHD),
    k.linear_recurrence: (x_BTD, x_BTD),
    k.causal_conv1d: (x_BTD, jnp.ones((4, 4))),
    k.selective_scan: (x_BTD, x_BTD, rates_DN, row_BTN, row_BTN),
    k.selective_scan_2d: (jnp.ones((1, 4, 2, 4)), *four),
    k.ssd: (x_BTHD, steps_BTH, -jnp.ones(2), row_BTN[:, :, None], row_BTN[:, :, None]),
    k.trapezoidal_ssd: (
        x_BTHD,
        steps_BTH,
        -steps_BTH,
        row_BTN[:, :, None],
        row_BTN[:, :, None],
        steps_BTH,
    ),
    k.rnn: (jnp.ones((1, 8, 2, 4, 3)), jnp.ones((2, 4, 3, 3))),
}
for call, arrays in CALLS.items():

    def total(*arrays, call=call):
        return sum(jnp.sum(x) for x in jax.tree.leaves(call(*arrays, backend=backend)))

    gradient = jax.grad(total)(*arrays)
    assert jnp.isfinite(gradient).all(), call
moment = frugax.formats.quantize(jnp.zeros((2, 256)), "dynamic8", axis=-1, group_size=128)
k.quantized_update("momentum", jnp.ones((2, 256)), (moment,), (0.9,), backend=backend)
assert "jax.experimental.pallas" not in sys.modules
