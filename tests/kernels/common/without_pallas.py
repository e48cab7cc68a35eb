"""Lower every operation, forward and backward, by the backend named or by `none`: no Pallas is loaded."""

import sys

from tests.kernels.harness import OPERATIONS, parts, program

backend = None if sys.argv[1] == "none" else sys.argv[1]
for row in OPERATIONS.values():
    floats, arrays, static = parts(row.calls.GOOD)
    function = program(row, backend if row.choice == "backend" else None, static)
    function.lower(floats, arrays, None)
assert "jax.experimental.pallas" not in sys.modules
