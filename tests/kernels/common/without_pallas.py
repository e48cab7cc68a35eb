"""Lower every operation, with its own pass back, by the backend named or by `none`: no Pallas is loaded."""

import sys

from tests.kernels.harness import OPERATIONS, parts, program

backend = None if sys.argv[1] == "none" else sys.argv[1]
for row in OPERATIONS.values():
    floats, arrays, static = parts(row.calls.GOOD)
    named = backend if row.choice == "backend" else None
    function = program(row, named, static, differentiate=not row.composed)
    function.lower(floats, arrays, None)
assert "jax.experimental.pallas" not in sys.modules
