"""Trees of clusters: each level is k-means within the node above, and documents find their own way down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import moe

RNG = np.random.default_rng(0)
BRANCHING = (3, 2)
# Six clusters in threes of pairs, so far apart that k-means can't miss them.
CENTRES = np.repeat(np.eye(5)[:3] * 100, 2, 0) + np.tile([[0.0] * 5, [10.0] * 5], (3, 1))
LABELS = np.arange(70) % 6
X = (CENTRES[LABELS] + RNG.standard_normal((70, 5))).astype(np.float32)


def test_clusters_within_clusters_are_found():
    tree = moe.cluster_tree(X, BRANCHING)
    path = np.asarray(jax.jit(moe.route_document)(X, tree))
    assert tree.nodes == (3, 6)
    assert (path[:, 0] == path[:, 1] // 2).all()
    for label in range(6):
        assert len({tuple(p) for p in path[label == LABELS]}) == 1
    assert len(np.unique(path[:, 1])) == 6
    for level, column in zip(tree.centroids, path.T, strict=True):
        want = [X[column == i].mean(0, dtype=np.float64) for i in range(len(level))]
        np.testing.assert_allclose(level, want, rtol=1e-5)
    same = moe.cluster_tree(X, BRANCHING)
    assert all((a == b).all() for a, b in zip(tree.centroids, same.centroids, strict=True))


def test_a_document_goes_to_the_nearest_child_of_each_node():
    """Against a loop, with any number of axes, of documents that the tree has not seen."""
    tree = moe.cluster_tree(RNG.standard_normal((200, 3)).astype(np.float32), (4, 3, 2), iterations=3)
    x = RNG.standard_normal((2, 11, 3)).astype(np.float32)
    path = np.asarray(jax.jit(moe.route_document)(x, tree))
    for at in np.ndindex(2, 11):
        node = 0
        for level, k in enumerate((4, 3, 2)):
            children = np.asarray(tree.centroids[level], np.float64)[node * k : node * k + k]
            node = node * k + int(np.argmin(((x[at] - children) ** 2).sum(-1)))
            assert path[at][level] == node


@pytest.mark.nan
def test_fewer_documents_than_nodes():
    """Empty nodes are infinitely far; what isn't finite has no way."""
    x = np.array([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]], np.float32)
    tree = moe.cluster_tree(x, (3, 4))
    path = np.asarray(jax.jit(moe.route_document)(np.vstack([x, np.float32([[np.nan, 0.0]])]), tree))
    assert path[0].tolist() == path[1].tolist() != path[2].tolist()
    assert path[3].tolist() == [-1, -1]
    for level, column in zip(tree.centroids, path[:3].T, strict=True):
        assert set(np.flatnonzero(np.isfinite(level).all(-1))) == set(column.tolist())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: moe.cluster_tree(np.full((3, 2), np.nan)), r"embeddings: got float64\[3, 2\]"),
        (lambda: moe.cluster_tree(np.ones((3, 2), int)), r"embeddings: got int64\[3, 2\]"),
        (lambda: moe.cluster_tree(X, ()), r"branching: got \(\)"),
        (lambda: moe.route_document(jnp.ones((2, 3)), moe.cluster_tree(X, (2,))), r"embedding: got \[2, 3\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
