"""Every function of weights and statistics under 64-bit defaults and without implicit broadcasting."""

import jax
import jax.numpy as jnp
import pytest

from frugax import quant

K, N = 13, 3
CALLS = {
    "gptq": lambda w, s: quant.gptq(w, s, "uint4", group_size=4),
    "act_order": lambda w, s: quant.gptq(w, s, "nvfp4", act_order=True),
    "blocks_inside_of_groups": lambda w, s: quant.gptq(w, s, "nf4", group_size=6, block=4),
    "awq": lambda w, s: quant.awq([w, w], s, "int4", group_size=4),
    "learned_rounding": lambda w, s: quant.learned_rounding(w, s, "int4", steps=2),
    "bias_correction": lambda w, s: quant.bias_correction(w, w, s),
    "smoothquant_scale": quant.smoothquant_scale,
    "equalization_scale": lambda w, s: quant.equalization_scale(w.mT, w),
    "divide_outputs": lambda w, s: quant.divide_outputs(w.mT, s.max_abs),
    "multiply_inputs": lambda w, s: quant.multiply_inputs(w, s.divided(s.max_abs).mean_abs),
    "output_error": lambda w, s: quant.output_error(w, w, s),
}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("stack", [(), (2,)], ids=["one", "stacked"])
def test_shapes_and_dtypes(name, dtype, stack):
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        w = jax.ShapeDtypeStruct((*stack, K, N), dtype)
        x = jax.ShapeDtypeStruct((*stack, 40, K), dtype)
        of = quant.Statistics.of if not stack else jax.vmap(quant.Statistics.of)
        found = jax.eval_shape(lambda w, x: CALLS[name](w, of(x)), w, x)
        as_given = {"divide_outputs": w.dtype, "multiply_inputs": w.dtype}
        for leaf in jax.tree.leaves(found):
            assert leaf.dtype in (as_given.get(name, jnp.float32), jnp.uint8, jnp.int8)
            assert leaf.shape[: len(stack)] == stack
