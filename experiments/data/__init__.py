"""Text for language models: which files, as which ids, in which batches.

`find_corpus` lists text and holds a share of it out, `load_tokenizer` turns it into ids (bytes by default),
and `make_loader` packs documents into batches for training, `heldout_batches` for evaluation.
"""

from experiments.data.corpus import Corpus, Span, find_corpus, limit_bytes
from experiments.data.pipeline import Loader, heldout_batches, make_loader
from experiments.data.tokenizer import Tokenizer, load_tokenizer, lost_share

__all__ = [
    "Corpus",
    "Loader",
    "Span",
    "Tokenizer",
    "find_corpus",
    "heldout_batches",
    "limit_bytes",
    "load_tokenizer",
    "lost_share",
    "make_loader",
]
