"""Which of a long list of cases run by default: a cover of what they have; the others are the full tier's."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import pytest

from tests.seeds import SEED, generator


def traits(case) -> set[tuple]:
    """Return what a case of named values has: flags, names, whether a size is one, or above 128."""
    fields = case if isinstance(case, dict) else case._asdict() if hasattr(case, "_asdict") else vars(case)

    def kind(value):
        is_size = isinstance(value, int) and not isinstance(value, bool)
        if is_size:
            return "one" if value == 1 else "few" if value <= 128 else "many"
        return repr(value) if isinstance(value, list) else value

    return {(name, kind(value)) for name, value in fields.items()}


def cover(sets: Sequence[set], strength: int = 1) -> list[int]:
    """Return the places of a few of the sets that hold each element of any; with strength 2, each pair that
    meets in any. Greedy: always the one that adds most, among equals the first, or by FRUGAX_TEST_SEED."""
    groups = [set(itertools.combinations(sorted(s, key=repr), strength)) for s in sets]
    order = generator(0).permutation(len(sets)).tolist() if SEED else range(len(sets))
    missing, chosen = set().union(*groups), []
    while missing:
        best = max(order, key=lambda i: len(groups[i] & missing))
        chosen.append(best)
        missing -= groups[best]
    return sorted(chosen)


def tiers(
    cases: Iterable, has: Callable[..., set] = traits, *, strength: int = 1, ids: Callable = str
) -> list:
    """Return the cases as parameters, each once, those that a cover leaves out marked `full`."""
    every = list(cases)
    cases = [case for i, case in enumerate(every) if case not in every[:i]]
    kept = cover([has(case) for case in cases], strength)
    return [
        pytest.param(case, id=ids(case), marks=[] if i in kept else pytest.mark.full)
        for i, case in enumerate(cases)
    ]


# Backends that share a cover: what they have in common is tried by one of them.
_ALIKE = ("xla",), (None, "reference"), ("pallas_tpu", "pallas_gpu")


def served(lists: dict[str | None, list], has: Callable[..., set] = traits, ids: Callable = str) -> list:
    """Return (backend, case) as parameters: by default the portable form meets each trait of its cases once,
    and so do kernels together, TPU's or Hopper's; each backend runs."""
    parameters = []
    for backends in _ALIKE:
        pairs = [(backend, case) for backend in backends for case in lists.get(backend, [])]
        pairs = [pair for i, pair in enumerate(pairs) if pair not in pairs[:i]]
        kept = cover([has(case) | {("backend", backend)} for backend, case in pairs])
        parameters += [
            pytest.param(
                backend, case, id=f"{backend}-{ids(case)}", marks=[] if i in kept else pytest.mark.full
            )
            for i, (backend, case) in enumerate(pairs)
        ]
    return parameters


# Chips of the full tier only: the default one compiles for a TPU with each size of matrix unit.
SECOND_CHIPS = ("v5p", "tpu7x")


def on_chips(chips: Iterable[str], calls: Iterable, ids: Callable = str) -> list:
    """Return (chip, call) as parameters: by default each first chip and each call once."""
    pairs = list(itertools.product(chips, calls))
    first = [pair for pair in pairs if pair[0] not in SECOND_CHIPS]
    kept = [first[i] for i in cover([{(place, str(x)) for place, x in enumerate(pair)} for pair in first])]
    return [
        pytest.param(*pair, id=f"{pair[0]}-{ids(pair[1])}", marks=[] if pair in kept else pytest.mark.full)
        for pair in pairs
    ]
