"""The tables of README.md and docs/, from the code and experiments/benchmarks/results: never written by hand.

python -m experiments.benchmarks.tables           rewrite them
python -m experiments.benchmarks.tables --check   say whether they are as this would write them
"""

import argparse
import sys

from .pages import PAGES, ROOT, rewritten


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if one is out of date")
    check = parser.parse_args().check
    for page in PAGES:
        new = rewritten(page)
        if check and new != (ROOT / page).read_text():
            sys.exit(f"{page}: tables out of date; `python -m experiments.benchmarks.tables` writes them")
        (ROOT / page).write_text(new)


if __name__ == "__main__":
    main()
