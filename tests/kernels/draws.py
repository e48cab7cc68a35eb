"""What the random arguments of operations have in common."""

import numpy as np


def document_ids(rng: np.random.Generator, B: int, T: int) -> np.ndarray:
    """Return the ids of some four documents a row; an id may come back later."""
    return np.cumsum(rng.random((B, T)) < 4 / T, axis=1).astype(np.int32) % 3


def wide(dtype: str) -> type:
    """Return the dtype of states and parameters beside inputs of a dtype."""
    return np.float64 if dtype == "float64" else np.float32
