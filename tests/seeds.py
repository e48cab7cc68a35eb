"""Random numbers of tests: the same in every run, or drawn anew with FRUGAX_TEST_SEED=1, 2, ..."""

import os

import numpy as np

SEED = int(os.environ.get("FRUGAX_TEST_SEED", "0"))


def generator(number: int) -> np.random.Generator:
    """Return the random numbers of a case that is told from others by `number`."""
    return np.random.default_rng([SEED, number] if SEED else number)
