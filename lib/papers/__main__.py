"""`python -m frugax.papers [words]`: where a paper lives in frugax, how to call it, and its test."""

import argparse
import signal
import sys

from . import describe, find


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m frugax.papers", description=__doc__)
    parser.add_argument("words", nargs="*", help="all of them must occur; none lists every paper")
    found = find(parser.parse_args().words)
    if not found:
        sys.exit("no paper has all of these words; `python -m frugax.papers` lists every one")
    print("\n\n".join(describe(p) for p in found))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
