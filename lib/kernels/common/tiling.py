"""Block sizes: a search through all that a chip's limits allow, ranked by what a choice costs.

FlashRNN's way: sizes are integers, limits are inequalities and divisibilities between them, and the search is
small enough to be exhaustive. Where nothing is feasible, the limit that is in the way says so.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is no less than n."""
    return -(-n // multiple) * multiple


def largest(candidates: Iterable[int], fits: Callable[[int], bool], otherwise: int | None = None) -> int:
    """The largest of the candidates that fits; `otherwise` if none does."""
    fitting = [n for n in candidates if fits(n)]
    if fitting:
        return max(fitting)
    if otherwise is None:
        raise ValueError("candidates: none fits; expected one at least, or `otherwise`")
    return otherwise


def largest_divisor(n: int, most: int) -> int:
    """The largest number that divides n and is at most `most`."""
    return largest(range(1, min(n, most) + 1), lambda size: n % size == 0)


class Limit(NamedTuple):
    """`amount` of every choice must be at most `most`."""

    what: str
    most: int
    amount: Callable[..., int]


class Found(NamedTuple):
    """The best feasible choice, or None and why there is none."""

    sizes: dict[str, int] | None
    reason: str | None


def search(space: Mapping[str, Iterable[int]], limits: Iterable[Limit], cost: Callable[..., Any]) -> Found:
    """The cheapest choice of one number of each range in `space` that keeps every limit.

    Args:
      space: name -> the numbers to try. They already divide what they must.
      limits: inequalities; `amount(**choice)` at most `most`.
      cost: what to minimize; of equals, the first.
    """
    limits = list(limits)
    choices = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    feasible = [c for c in choices if all(limit.amount(**c) <= limit.most for limit in limits)]
    if feasible:
        return Found(min(feasible, key=lambda c: cost(**c)), None)
    if not choices:
        empty = next(name for name, values in space.items() if not list(values))
        return Found(None, f"no size of {empty} divides what it must")
    for limit in limits:
        least = min(limit.amount(**c) for c in choices)
        if least > limit.most:
            return Found(None, f"at least {least:,} {limit.what}, {limit.most:,} are there")
    return Found(None, "no choice of sizes keeps all of: " + ", ".join(limit.what for limit in limits))
