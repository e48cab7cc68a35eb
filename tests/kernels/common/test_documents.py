"""Documents in packed rows, against a loop over tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from frugax.kernels.common.documents import documents


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
@pytest.mark.parametrize("T", [1, 2, 301])
def test_every_form_equals_a_loop(T, dtype):
    rng = np.random.default_rng(T)  # 301 ids wrap around in 8 bits
    ids = np.cumsum(rng.integers(0, 2, (3, T)), axis=1).astype(jnp.dtype(dtype).name)
    before = np.array([0, 4, 9])
    packed = documents(jnp.asarray(ids), 3, T)
    starts, ends, index, reach = (np.zeros((3, T), int) for _ in range(4))
    for b in range(3):
        for t in range(T):
            starts[b, t] = t > 0 and ids[b, t] != ids[b, t - 1]
            ends[b, t] = t < T - 1 and ids[b, t] != ids[b, t + 1]
            index[b, t] = index[b, t - 1] + starts[b, t] if t else 0
            reach[b, t] = 0 if starts[b, t] else reach[b, t - 1] + 1 if t else before[b]
    np.testing.assert_array_equal(packed.starts, starts)
    np.testing.assert_array_equal(packed.ends, ends)
    np.testing.assert_array_equal(packed.index, index)
    np.testing.assert_array_equal(packed.reach(jnp.asarray(before)), reach)


def test_names_what_is_wrong():
    assert documents(None, 2, 3) is None
    for wrong in (jnp.ones((2, 3)), jnp.ones((3, 2), int)):
        with pytest.raises(ValueError, match=r"segment_ids: got .*; expected integers \[2, 3\]"):
            documents(wrong, 2, 3)
