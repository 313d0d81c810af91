"""Rows of options in which every pair of values that can stand together does so at least once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]
_Numbers = tuple[int, ...]  # the number of the value of each option
_Pair = tuple[int, int, int, int]  # an option and the number of its value, twice
_Price = Callable[[_Numbers], int | None]

RANDOM_TRIES = 300
PROBES = 100


def covering_array(
    options: Mapping[str, Sequence[Any]],
    valid: Callable[[Row], bool] = lambda row: True,
    seed: int = 0,
    *,
    cost: Callable[[Row], int] | None = None,
    wide: bool = True,
) -> list[Row]:
    """Rows {option: value} of `options` {option: values, the default first}; deterministic, and the first is that of the defaults.

    `valid` and `cost` see whole rows. A pair of values is possible where a valid row has it: looked for next to the defaults, by one or
    two more options set to other values, and then among 300 random rows. With `cost` it stands in a row of the least cost that was found
    for it, the two options are of those that validity and cost hang on, and pairs of low cost have their rows first. Not `wide`: it is
    looked for by one more option alone, unless there is no row then. Raises ValueError where the defaults are not valid.
    """
    names, values = list(options), [tuple(found) for found in options.values()]

    def price(numbers: _Numbers) -> int | None:
        """None: not valid."""
        if numbers not in known:
            row = {name: values[i][number] for i, (name, number) in enumerate(zip(names, numbers, strict=True))}
            known[numbers] = (cost(row) if cost else 0) if valid(row) else None
        return known[numbers]

    known: dict[_Numbers, int | None] = {}
    sizes = [len(found) for found in values]
    defaults = (0,) * len(names)
    if price(defaults) is None:
        raise ValueError(
            f"options: the first values are the defaults, and are not valid together: {dict(zip(names, defaults, strict=True))}"
        )
    generator = random.Random(seed)
    deciding = _deciding(sizes, price, random.Random(seed)) if cost else range(len(sizes))
    rows, covered = [defaults], set(_pairs(defaults))

    def add(start: _Numbers, pair: _Pair, most: int) -> None:
        def fits(numbers: _Numbers) -> bool:
            own = price(numbers)
            return own is not None and own <= most

        rows.append(_climb(start, pair, sizes, covered, fits, generator))
        covered.update(_pairs(rows[-1]))

    later: list[tuple[int, _Pair, _Numbers]] = []
    for pair in _all_pairs(sizes):
        if pair not in covered and (found := _cheapest(pair, sizes, deciding, price, generator, wide)) is not None:
            if found[0] == 0:
                add(found[1], pair, 0)
            else:
                later.append((found[0], pair, found[1]))
    for most, pair, start in sorted(later):
        if pair not in covered:
            add(start, pair, most)
    return [{name: values[i][number] for i, (name, number) in enumerate(zip(names, numbers, strict=True))} for numbers in rows]


def _deciding(sizes: list[int], price: _Price, generator: random.Random) -> Sequence[int]:
    """The options that made a difference to the price of some row near the defaults, or of a random one."""
    found = set()
    for probe in range(PROBES):
        numbers = tuple(generator.randrange(size) if generator.random() < probe / PROBES else 0 for size in sizes)
        for k in range(len(sizes)):
            if k not in found and any(price(_with(numbers, (k, number))) != price(numbers) for number in range(sizes[k])):
                found.add(k)
    return sorted(found)


def _cheapest(
    pair: _Pair, sizes: list[int], deciding: Sequence[int], price: _Price, generator: random.Random, wide: bool
) -> tuple[int, _Numbers] | None:
    """The first row of the least price that has the pair, with its price."""
    best = None
    near_enough = 1 + sum(sizes[k] - 1 for k in deciding)
    for number, near in enumerate(_rows_with(pair, sizes, deciding, generator)):
        if best is not None and not wide and number >= near_enough:
            break
        own = price(near)
        if own is not None and (best is None or own < best[0]):
            best = own, near
            if own == 0:
                break
    return best


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


def _rows_with(pair: _Pair, sizes: list[int], deciding: Sequence[int], generator: random.Random) -> Iterator[_Numbers]:
    """Rows that have the pair, those near the defaults first."""
    i, a, j, b = pair
    base = _with((0,) * len(sizes), (i, a), (j, b))
    yield base
    others = [(k, number) for k in deciding if k not in (i, j) for number in range(1, sizes[k])]
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
