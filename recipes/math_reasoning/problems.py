"""Word problems of two to four steps with exact answers: `rows()` is what `prompts.file` draws from.

Each problem is a function of a random generator that returns the text and the number asked for, so the reference is
computed and never guessed.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from random import Random

NAMES = [
    *("Anna", "Ben", "Clara", "David", "Elena", "Felix", "Greta", "Hugo"),
    *("Irene", "Jonas", "Katja", "Leon", "Maria", "Nils", "Olga", "Pablo"),
]
THINGS = ["apples", "pens", "stickers", "books", "marbles", "cookies", "shells", "stamps", "cards", "candles"]


def bags(r: Random) -> tuple[str, int]:
    name, thing, count, each, given = (
        r.choice(NAMES),
        r.choice(THINGS),
        r.randint(3, 9),
        r.randint(4, 15),
        r.randint(2, 11),
    )
    text = (
        f"{name} has {count} bags with {each} {thing} each and gives {given} {thing} away. How many {thing} are left?"
    )
    return text, count * each - given


def shopping(r: Random) -> tuple[str, int]:
    name, first, second = r.choice(NAMES), r.randint(2, 8), r.randint(2, 8)
    price, other, paid = r.randint(2, 9), r.randint(2, 9), r.choice([150, 200, 250])
    text = (
        f"{name} buys {first} notebooks for {price} dollars each and {second} folders for {other} dollars each, "
        f"and pays with {paid} dollars. How many dollars does {name} get back?"
    )
    return text, paid - first * price - second * other


def saving(r: Random) -> tuple[str, int]:
    name, start, week, spent, weeks = (
        r.choice(NAMES),
        r.randint(10, 90),
        r.randint(5, 20),
        r.randint(5, 40),
        r.randint(3, 12),
    )
    text = (
        f"{name} has {start} dollars, saves {week} dollars a week for {weeks} weeks, and then spends {spent} dollars. "
        f"How many dollars does {name} have now?"
    )
    return text, start + week * weeks - spent


def ages(r: Random) -> tuple[str, int]:
    name, other = r.sample(NAMES, 2)
    age, times, years = r.randint(4, 12), r.randint(2, 5), r.randint(2, 15)
    text = f"{name} is {age} years old and {other} is {times} times as old. How old will {other} be in {years} years?"
    return text, age * times + years


def travel(r: Random) -> tuple[str, int]:
    speed, hours, rest = r.choice([40, 50, 60, 70, 80, 90]), r.randint(2, 6), r.randint(10, 95)
    text = (
        f"A train goes {speed} kilometres an hour for {hours} hours and then another {rest} kilometres. "
        "How many kilometres is the whole way?"
    )
    return text, speed * hours + rest


def sharing(r: Random) -> tuple[str, int]:
    friends, each, over, thing = r.randint(3, 9), r.randint(3, 12), r.randint(1, 2), r.choice(THINGS)
    total = friends * each + over
    text = (
        f"{friends} friends share {total} {thing} so that each has the same number and as few as possible are left. "
        f"How many {thing} does each friend get?"
    )
    return text, each


def percent(r: Random) -> tuple[str, int]:
    price, off, count = r.choice([20, 40, 60, 80, 120, 200]), r.choice([5, 10, 20, 25, 50]), r.randint(2, 6)
    text = (
        f"A shirt costs {price} dollars. In the sale it is {off} percent cheaper. "
        f"How many dollars do {count} such shirts cost in the sale?"
    )
    price *= 100 - off
    return text, price * count // 100


def rooms(r: Random) -> tuple[str, int]:
    length, width, tile = r.randint(4, 12), r.randint(3, 9), r.randint(2, 9)
    text = (
        f"A room is {length} metres long and {width} metres wide. A square metre of floor costs {tile} dollars. "
        "How many dollars does the floor cost?"
    )
    return text, length * width * tile


def workers(r: Random) -> tuple[str, int]:
    people, days, more = r.randint(2, 6), r.randint(2, 6), r.randint(1, 4)
    daily = r.randint(3, 12)
    text = (
        f"{people} workers each make {daily} chairs a day. After {days} days {more} more workers join, and all of them "
        "work one day more. How many chairs have been made in all?"
    )
    return text, people * daily * days + (people + more) * daily


def halves(r: Random) -> tuple[str, int]:
    name, half, thing, found = r.choice(NAMES), r.randint(6, 40), r.choice(THINGS), r.randint(3, 20)
    text = (
        f"{name} has {2 * half} {thing}, gives half of them to a friend and then finds {found} more. "
        f"How many {thing} does {name} have now?"
    )
    return text, half + found


PROBLEMS: list[Callable[[Random], tuple[str, int]]] = [
    bags, shopping, saving, ages, travel, sharing, percent, rooms, workers, halves,
]  # fmt: skip


def rows() -> Iterator[dict[str, str]]:
    """5,000 different problems; the kinds take turns."""
    return islice(_different(Random(0)), 5000)


def _different(rng: Random) -> Iterator[dict[str, str]]:
    asked = set()
    for problem in cycle(PROBLEMS):
        text, answer = problem(rng)
        if text not in asked:
            asked.add(text)
            yield {"prompt": text, "reference": str(answer), "kind": problem.__name__}
