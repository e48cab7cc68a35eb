"""A tree of clusters of documents, and each document's way down it: routing by document, not by token."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClusterTree:
    """Centroids of nested clusters. The children of node i of a level are i * k to i * k + k - 1 of the next.

    Attributes:
      centroids: of each level's nodes, [N_l, D], where N_l is the product of the branching so far. A node
        that no document is in has infinite ones.

    Example:
        >>> import frugax, numpy as np
        >>> tree = frugax.moe.cluster_tree(np.eye(6), branching=(2, 3))
        >>> tree.nodes, tree.centroids[1].shape
        ((2, 6), (6, 6))
    """

    centroids: tuple[Float[Array, "_ d"], ...]

    @property
    def nodes(self) -> tuple[int, ...]:
        """The number of nodes of each level below the root."""
        return tuple(level.shape[0] for level in self.centroids)


def cluster_tree(
    embeddings: Float[np.ndarray | Array, "n d"],
    branching: Sequence[int] = (16, 16, 16, 16),
    *,
    seed: int = 0,
    iterations: int = 25,
) -> ClusterTree:
    """Cluster documents, then the documents of each cluster, and so on: k-means from the top down.

    It runs in NumPy, ahead of training, and gives the same tree each time.

    Args:
      embeddings: of n documents, such as the means of a sentence encoder's outputs.
      branching: children of a node, level by level.
      seed: of k-means++, which chooses the first centroids.
      iterations: of Lloyd's algorithm, at most, in each node.

    Returns:
      A `ClusterTree`. A node with fewer distinct documents than children
      leaves the last children empty.

    Raises:
      ValueError: embeddings are no finite floats [documents, width], or the branching is no numbers >= 1.

    Source: Pouransari et al. 2025 (arXiv 2510.02375); k-means++ of Arthur and Vassilvitskii 2007.

    Example:
        >>> import frugax, numpy as np
        >>> documents = np.array([[0.0], [1.0], [10.0], [11.0]])
        >>> tree = frugax.moe.cluster_tree(documents, branching=(2,))
        >>> sorted(tree.centroids[0].ravel().tolist())
        [0.5, 10.5]
    """
    x = np.asarray(embeddings)
    if x.ndim != 2 or 0 in x.shape or not np.issubdtype(x.dtype, np.floating) or not np.isfinite(x).all():
        raise ValueError(
            f"embeddings: got {x.dtype}{list(x.shape)}; expected finite floats [documents, width]"
        )
    if not branching or min(branching) < 1:
        raise ValueError(f"branching: got {tuple(branching)}; expected numbers >= 1, one for each level")
    rng = np.random.default_rng(seed)
    node, count = np.zeros(len(x), int), 1
    centroids = []
    for children in branching:
        level = np.full((count, children, x.shape[1]), np.inf, x.dtype)
        for i in np.unique(node):
            level[i] = _k_means(x[node == i], children, rng, iterations)
        node = node * children + np.argmin(_distances(x, level[node]), -1)
        count *= children
        centroids.append(jnp.asarray(level.reshape(count, -1)))
    return ClusterTree(tuple(centroids))


def route_document(embedding: Float[Array, "... d"], tree: ClusterTree) -> Int[Array, "... l"]:
    """Send each document down the tree, to the nearest child of each node.

    Args:
      embedding: of documents.
      tree: from `cluster_tree`.

    Returns:
      The document's node on each level, int32 [..., L], for `fetch`; -1 where an embedding is not finite.

    Raises:
      ValueError: the embedding has not the centroids' width.

    Source: Pouransari et al. 2025 (arXiv 2510.02375).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> levels = jnp.array([[0.0], [9.0]]), jnp.array([[-1.0], [1.0], [8.0], [10.0]])
        >>> tree = frugax.moe.ClusterTree(levels)
        >>> frugax.moe.route_document(jnp.array([[0.6], [8.3]]), tree).tolist()
        [[0, 1], [1, 2]]
    """
    width = tree.centroids[0].shape[-1]
    if embedding.ndim < 1 or embedding.shape[-1] != width:
        raise ValueError(f"embedding: got {list(embedding.shape)}; expected [..., {width}], as the centroids")
    node, count = jnp.zeros(embedding.shape[:-1], jnp.int32), 1
    path = []
    for level in tree.centroids:
        children = level.shape[0] // count
        near = level.reshape(count, children, width)[node]
        child = jnp.argmin(jnp.sum(jnp.square(embedding[..., None, :] - near), -1), -1)
        node, count = node * children + child.astype(jnp.int32), level.shape[0]
        path.append(node)
    finite = jnp.all(jnp.isfinite(embedding), -1, keepdims=True)
    return jnp.where(finite, jnp.stack(path, -1), -1)


def _distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances [n, k] of x [n, D] from centroids [k, D] or, for each its own, [n, k, D]."""
    return np.stack([np.square(x - centroids[..., i, :]).sum(-1) for i in range(centroids.shape[-2])], -1)


def _k_means(x: np.ndarray, k: int, rng: np.random.Generator, iterations: int) -> np.ndarray:
    """Centroids [k, D] of x [n, D]; infinite ones are left over where x has fewer distinct rows."""
    chosen = [x[rng.integers(len(x))]]
    while len(chosen) < k:  # k-means++: far documents are likelier to be the next centroid
        away = _distances(x, np.stack(chosen)).min(-1)
        if not away.any():
            break
        chosen.append(x[rng.choice(len(x), p=away / away.sum(dtype=np.float64))])
    centroids = np.stack(chosen)
    nearest = None
    for _ in range(iterations):
        distances = _distances(x, centroids)
        before, nearest = nearest, distances.argmin(-1)
        if before is not None and (before == nearest).all():
            break
        for i in range(len(centroids)):
            mine = x[nearest == i]
            # An empty cluster starts anew at the document that is farthest from its centroid.
            centroids[i] = mine.mean(0) if len(mine) else x[distances.min(-1).argmax()]
    unused = np.full((k - len(centroids), x.shape[1]), np.inf, x.dtype)
    return np.concatenate([centroids, unused])
