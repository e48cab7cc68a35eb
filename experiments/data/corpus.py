"""Lists of the text there is, and of the share that is held out."""

import dataclasses
import glob
import hashlib
import os
import pathlib
import sysconfig

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
_SNIFFED = 4096  # a NUL among the first bytes tells a binary file from text, as git decides it


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of one file: a document."""

    path: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        """The document's bytes.

        Raises:
            ValueError: the file is shorter than when the corpus was listed.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(len(self))
        if len(data) != len(self):
            raise ValueError(
                f"path: got {self.path}, which has changed and ends before byte {self.stop}; expected it as "
                "it was listed"
            )
        return data


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files of text in a fixed order, and the documents (spans of those files) of each split."""

    root: str
    files: tuple[str, ...]
    train: tuple[Span, ...]
    heldout: tuple[Span, ...]

    @property
    def digest(self) -> str:
        """Changes where a name, a size or the split changes: what a resumed run compares."""
        digest = hashlib.sha256()
        for split in (self.train, self.heldout):
            for span in split:
                digest.update(
                    f"{_relative(span.path, self.root)}\0{span.start}\0{span.stop}\0".encode(errors="replace")
                )
            digest.update(b"\n")
        return digest.hexdigest()[:16]

    def __str__(self) -> str:
        def words(spans: tuple[Span, ...]) -> str:
            return f"{len(spans):,} documents of {sum(map(len, spans)):,} bytes"

        how = "the tail of the one file" if len(self.files) == 1 and self.heldout else "by file"
        return f"{self.root}: {words(self.train)} to train on, {words(self.heldout)} held out ({how})"


def find_corpus(path: str | os.PathLike | None = None, *, heldout: float = 0.05) -> Corpus:
    """List a corpus and hold a share of it out, the same way every time.

    Held out are files at equal steps through the sorted list (every 20th for 0.05), so each folder gives its
    share and files of one kind do not gather on one side, as they can in a draw. Of a single file, the tail
    is held out (from the first line that starts in it).

    Args:
        path: a folder (every text file below it, hidden ones left out), a glob (`**` goes into folders), or
            one file. None is the standard library's sources of the running interpreter: about 30 MB of
            Python.
        heldout: the share of the files (of the bytes, for a single file) to hold out; at least one file where
            it is positive.

    Returns:
        The corpus. Empty files are left out.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is no text in it, or too little to hold any out.

    Example:
        >>> corpus = find_corpus(None, heldout=0.05)
        >>> len(corpus.train) > 10 * len(corpus.heldout) > 0
        True
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout: got {heldout}; expected a share of at least 0 and below 1")
    root, names = _list_files(path)
    spans = [Span(name, 0, size) for name in names if (size := os.path.getsize(name))]
    if not spans:
        raise ValueError(
            f"path: got {root!r}, {_emptiness(names)}; expected a folder, glob or file with text in it"
        )
    files = tuple(span.path for span in spans)
    if heldout == 0:
        return Corpus(root, files, tuple(spans), ())
    if len(spans) == 1:
        train, kept = _cut_tail(spans[0], heldout)
        return Corpus(root, files, (train,), (kept,))
    count = min(max(round(heldout * len(spans)), 1), len(spans) - 1)
    chosen = {spans[int((i + 0.5) * len(spans) / count)] for i in range(count)}  # the middle of equal parts
    return Corpus(
        root,
        files,
        train=tuple(span for span in spans if span not in chosen),
        # In hash order, so that any prefix of the held-out split is a fair sample of it.
        heldout=tuple(sorted(chosen, key=lambda span: _hash(_relative(span.path, root)))),
    )


def limit_bytes(spans: tuple[Span, ...], limit: int | None) -> tuple[Span, ...]:
    """The first documents of `spans` that make up `limit` bytes, the last one cut to fit; all of them for
    None.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is None:
        return spans
    if limit < 1:
        raise ValueError(f"limit: got {limit}; expected at least 1 byte, or None for all")
    kept = []
    for span in spans:
        size = min(len(span), limit)
        kept.append(Span(span.path, span.start, span.start + size))
        limit -= size
        if limit == 0:
            break
    return tuple(kept)


def _list_files(path: str | os.PathLike | None) -> tuple[str, list[str]]:
    """The root that names are relative to, and the files in a fixed order."""
    if path is None:
        root = sysconfig.get_path("stdlib")
        names = [name for name in _walk(root) if name.endswith(".py")]
        if not names:
            raise FileNotFoundError(f"path: got none, and {root} has no sources; expected a corpus")
        return root, names
    root = os.path.expanduser(os.fspath(path))
    if os.path.isfile(root):
        return root, [root]
    if os.path.isdir(root):
        return root, [name for name in _walk(root) if _is_text(name)]
    if not glob.has_magic(root):
        raise FileNotFoundError(
            f"path: got {root!r}, which is not there; expected a folder, a glob or a file"
        )
    names = sorted(name for name in glob.glob(root, recursive=True) if os.path.isfile(name))
    if not names:
        raise FileNotFoundError(
            f"path: got {root!r}, which matches no file; expected a quoted glob, with ** to go into folders"
        )
    return os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in names]), names


def _walk(root: str) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    found = [name for name in found if os.path.isfile(name)]
    return sorted(found, key=lambda name: _relative(name, root))


def _is_text(name: str) -> bool:
    with open(name, "rb") as file:
        return b"\0" not in file.read(_SNIFFED)


def _relative(name: str, root: str) -> str:
    """The same on every machine: slashes, and nothing of where the corpus lies."""
    if name == root:
        return os.path.basename(name)
    return pathlib.PurePath(os.path.relpath(name, root)).as_posix()


def _hash(name: str) -> float:
    """A stable number in [0, 1) for a name."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6]) / 2**48


def _emptiness(names: list[str]) -> str:
    if not names:
        return "which holds no text files"
    return "an empty file" if len(names) == 1 else f"with {len(names)} files, all empty"


def _cut_tail(span: Span, share: float) -> tuple[Span, Span]:
    cut = span.stop - max(1, round(share * len(span)))
    with open(span.path, "rb") as file:
        file.seek(cut)
        newline = file.read(2**16).find(b"\n")
    # The line that holds the cut goes to the training split, unless nothing would be left (or lines are
    # huge).
    if newline >= 0 and cut + newline + 1 < span.stop:
        cut += newline + 1
    if not 0 < cut < span.stop:
        raise ValueError(
            f"path: got {span.path!r} of {span.stop} bytes; expected enough to hold some out, or heldout=0"
        )
    return Span(span.path, 0, cut), Span(span.path, cut, span.stop)
