"""A template and its slots: how many different prompts they make, and the prompt and its reference at each index.

A prompt's index is a number in mixed radix, one digit per slot, so a grammar of any size is counted and drawn from
without being listed. Pure: reads and writes nothing. All choices come from SHAKE-128 and BLAKE2, so the same seed gives
the same prompts with any Python, on any machine, whatever PYTHONHASHSEED is.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from hashlib import blake2b, shake_128
from string import Formatter
from typing import Any

from pipeline.errors import RecipeError
from pipeline.prompts_config import ChooseSlot, PromptsConfig, slot_values
from pipeline.records import Slots

ROUNDS = 3  # of the shuffle; each computes two hashes


class Grammar:
    """The prompts that a template and its slots make. Raises RecipeError if the two do not fit."""

    def __init__(self, config: PromptsConfig) -> None:
        self._template, self._reference = config.template or "", config.reference
        named = _named_slots("prompts.template", self._template, config.slots)
        if unused := [name for name in config.slots if name not in named]:
            raise RecipeError(
                f"prompts.slots has {_quoted(unused)}, which prompts.template does not name; add it to the template or "
                "remove it"
            )
        _filled(self._reference, lambda text: _named_slots("prompts.reference", text, config.slots))
        self._digits = [_Digit(name, slot) for name, slot in config.slots.items()]
        # How many different prompts there are: `choose` counts combinations, a value given twice counts once.
        self.size = math.prod(digit.size for digit in self._digits)

    def at(self, index: int) -> tuple[str, Slots]:
        """The text and the slots' values of the prompt at an index in [0, size)."""
        slots: Slots = {}
        rest = index
        for digit in self._digits:
            rest, value = divmod(rest, digit.size)
            slots[digit.name] = digit.at(value, index)
        return self._template.format_map(_words(slots)), slots

    def reference(self, slots: Slots) -> Any:
        words = _words(slots)
        return _filled(self._reference, lambda text: text.format_map(words))

    def draw(self, count: int, seed: int) -> Iterator[tuple[str, Slots]]:
        """`count` prompts in a random order that the seed decides: each prompt once, then all of them again.

        A larger count begins with the same prompts.
        """
        for index in range(count):
            turn, index_in_turn = divmod(index, self.size)
            yield self.at(shuffled(index_in_turn, self.size, f"{seed}:{turn}"))


class _Digit:
    """One slot: its different values, or its combinations."""

    def __init__(self, name: str, slot: list[str] | ChooseSlot) -> None:
        self.name = name
        self._values = list(dict.fromkeys(slot_values(slot)))
        self._listed = isinstance(slot, ChooseSlot)
        self._choose = slot.choose if isinstance(slot, ChooseSlot) else 1
        self.size = math.comb(len(self._values), self._choose)

    def at(self, value: int, index: int) -> str | list[str]:
        """The slot's value. The order within a combination depends only on the prompt's index."""
        chosen = [self._values[i] for i in combination(value, len(self._values), self._choose)]
        if not self._listed:
            return chosen[0]
        return sorted(chosen, key=lambda item: blake2b(f"{index}:{self.name}:{item}".encode()).digest())


def combination(rank: int, n: int, k: int) -> list[int]:
    """The combination of k numbers below n that has this rank in the combinatorial number system (Knuth 7.2.1.3)."""
    chosen = []
    for left in range(k, 0, -1):
        n = bisect_right(range(n), rank, key=lambda number: math.comb(number, left)) - 1
        rank -= math.comb(n, left)
        chosen.append(n)
    return chosen[::-1]


def shuffled(index: int, size: int, key: str) -> int:
    """Where a keyed permutation of range(size) sends an index. It needs no memory, whatever the size.

    A generalised Feistel network on two digits (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): the
    grid is the smallest that holds the range, and an index outside the range is sent on until it is inside.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    while True:
        left, right = divmod(index, columns)
        for turn in range(ROUNDS):
            left = (left + _hash(f"{key}:{turn}l:{right}", rows)) % rows
            right = (right + _hash(f"{key}:{turn}r:{left}", columns)) % columns
        index = left * columns + right
        if index < size:
            return index


def _hash(text: str, below: int) -> int:
    """A number below the bound. It is made of 8 bytes more than needed, so that the remainder is nearly uniform."""
    return int.from_bytes(shake_128(text.encode()).digest(below.bit_length() // 8 + 9)) % below


def _words(slots: Slots) -> dict[str, str]:
    return {name: value if isinstance(value, str) else ", ".join(value) for name, value in slots.items()}


def _filled(value: Any, fill: Callable[[str], Any]) -> Any:
    """A JSON value with `fill` applied to each text in it; the keys of its objects stay."""
    if isinstance(value, dict):
        return {key: _filled(inner, fill) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, fill) for inner in value]
    return fill(value) if isinstance(value, str) else value


def _named_slots(key: str, text: str, slots: Collection[str]) -> set[str]:
    """The slots that a text names. Raises RecipeError unless each is one of `slots` and a plain {name}."""
    braces = "write a literal brace as {{ or }}"
    try:
        fields = list(Formatter().parse(text))
    except ValueError as error:
        raise RecipeError(f"{key}: {error}; {braces}") from None
    named: dict[str, None] = {}
    for _, name, spec, conversion in fields:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            whole = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise RecipeError(f"{key}: {{{whole}}} is not a slot: only {{name}} is; {braces}")
        named[name] = None
    if unknown := [name for name in named if name not in slots]:
        raise RecipeError(
            f"{key} names {_quoted(unknown)}, which prompts.slots does not have; "
            f"there are: {', '.join(slots) or 'none'}"
        )
    return set(named)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
