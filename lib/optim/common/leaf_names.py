"""The words in a leaf's path: which of them say that the leaf is no matrix."""

import re

# Found anywhere in a path: embeddings, norms, biases, convolutions, heads (but not "MultiHeadAttention").
PLAIN = (
    r"\b(embed|embedder|embeddings?|emb|unembed|unembedding|wte|wpe"
    r"|norms?|(layer|rms|group|batch|instance)norm|ln|bn"
    r"|bias|biases|dw|convs?|convolutions?"
    r"|logits|router)\b"
    r"|(?<!multi )\bhead( \d+)*(/|$)"
)

# Names of leaves that are vectors: where `nn.scan` stacks those of many layers, they have two axes.
VECTORS = r"b|scale|gain|gamma|beta|a log|d|decay|bonus|mu|mu x"

# Names of leaves that are matrices, whatever their sides.
MATRICES = r"kernel|weight|w\d*"


def in_words(path: str) -> str:
    """Write a path in words of lower case: "MLP_0/LayerNorm/w1" as "mlp 0/layer norm/w 1".

    Example:
        >>> from frugax.optim.common.leaf_names import in_words
        >>> in_words("unembedded_mlp/Conv_0/A_log")
        'unembedded mlp/conv 0/a log'
    """
    words = (re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", part) for part in path.split("/"))
    return "/".join(" ".join(part).lower() for part in words)


def is_plain(path: str, plain: str) -> bool:
    """Test if `plain` is found in the words of a path."""
    return bool(plain) and re.search(plain, in_words(path)) is not None


def is_vector(path: str) -> bool:
    """Test if a leaf's own name is that of a vector."""
    own = re.sub(r"( \d+)+$", "", in_words(path).split("/")[-1])
    return re.fullmatch(VECTORS, own) is not None
