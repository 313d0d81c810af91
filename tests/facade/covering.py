"""Rows of options in which every pair of values that can stand together does so at least once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
_Numbers = tuple[int, ...]  # the number of the value of each option
_Pair = tuple[int, int, int, int]  # an option and the number of its value, twice

RANDOM_TRIES = 300


def covering_array(options: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool] = lambda row: True, seed: int = 0) -> list[Row]:
    """Rows {option: value} of `options` {option: values, the default first}; deterministic, and the first is that of the defaults.

    `valid` sees whole rows. A pair of values is possible where a row has it: looked for next to the defaults, by at most two more options
    set to other values, and then among 300 random rows. Raises ValueError where the row of the defaults is not valid.
    """
    names, values = list(options), [tuple(found) for found in options.values()]

    def row(numbers: _Numbers) -> Row:
        return {name: values[i][number] for i, (name, number) in enumerate(zip(names, numbers, strict=True))}

    def fits(numbers: _Numbers) -> bool:
        if numbers not in known:
            known[numbers] = bool(valid(row(numbers)))
        return known[numbers]

    known: dict[_Numbers, bool] = {}
    sizes = [len(found) for found in values]
    defaults = (0,) * len(names)
    if not fits(defaults):
        raise ValueError(f"options: the first values are the defaults, and are not valid together: {row(defaults)}")
    generator = random.Random(seed)
    rows = [defaults]
    covered = set(_pairs(defaults))
    for pair in _all_pairs(sizes):
        if pair in covered:
            continue
        start = next((near for near in _rows_with(pair, sizes, generator) if fits(near)), None)
        if start is not None:
            rows.append(_climb(start, pair, sizes, covered, fits, generator))
            covered |= set(_pairs(rows[-1]))
    return [row(numbers) for numbers in rows]


def _all_pairs(sizes: list[int]) -> Iterator[_Pair]:
    for i, j in combinations(range(len(sizes)), 2):
        for a in range(sizes[i]):
            for b in range(sizes[j]):
                yield i, a, j, b


def _pairs(numbers: _Numbers) -> Iterator[_Pair]:
    for (i, a), (j, b) in combinations(enumerate(numbers), 2):
        yield i, a, j, b


def _with(numbers: _Numbers, *changes: tuple[int, int]) -> _Numbers:
    changed = list(numbers)
    for i, number in changes:
        changed[i] = number
    return tuple(changed)


def _rows_with(pair: _Pair, sizes: list[int], generator: random.Random) -> Iterator[_Numbers]:
    """Rows that have the pair, those near the defaults first."""
    i, a, j, b = pair
    base = _with((0,) * len(sizes), (i, a), (j, b))
    yield base
    others = [(k, number) for k, size in enumerate(sizes) if k not in (i, j) for number in range(1, size)]
    for change in others:
        yield _with(base, change)
    for first, second in combinations(others, 2):
        if first[0] != second[0]:
            yield _with(base, first, second)
    for _ in range(RANDOM_TRIES):
        yield _with(tuple(generator.randrange(size) for size in sizes), (i, a), (j, b))


def _climb(
    start: _Numbers, pair: _Pair, sizes: list[int], covered: set[_Pair], fits: Callable[[_Numbers], bool], generator: random.Random
) -> _Numbers:
    """A valid row with the pair that has as many new pairs as changing one option after the other reaches."""
    free = [k for k in range(len(sizes)) if k not in (pair[0], pair[2])]
    best = start
    for _ in range(2):
        generator.shuffle(free)
        for k in free:
            gains = [(_new_pairs(best, k, number, covered), number == best[k], -number) for number in range(sizes[k])]
            for _, _, negative in sorted(gains, reverse=True):
                changed = _with(best, (k, -negative))
                if changed == best or fits(changed):
                    best = changed
                    break
    return best


def _new_pairs(numbers: _Numbers, k: int, number: int, covered: set[_Pair]) -> int:
    """How many pairs of that value of option k with the others of the row are new."""
    pairs = ((k, number, i, a) if k < i else (i, a, k, number) for i, a in enumerate(numbers) if i != k)
    return sum(pair not in covered for pair in pairs)
