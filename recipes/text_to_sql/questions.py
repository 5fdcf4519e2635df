"""The questions of the recipe, filled from questions.yaml with values of the shop; the gold SQL is their reference.

Reads questions.yaml, evolved.jsonl and shop.sql beside it. evolved.jsonl has questions that the teacher wrote after
some of these (`python -m filters.evolve`), without gold SQL. `prompts.file` draws from `rows()`. The templates set
apart as unseen make unseen.jsonl, which `evaluate.probes_file` names: `python recipes/text_to_sql/questions.py` writes
it again. For a database of your own, change these three files; this one stays as it is.
"""

import json
import re
import sqlite3
from collections.abc import Iterator
from itertools import islice
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import yaml

HERE = Path(__file__).parent
TURNS = (5, 2)  # so many questions of templates, then so many that the teacher wrote, while there are any


def rows() -> Iterator[dict[str, str]]:
    """20,000 different questions of the seen templates, and between them those that the teacher wrote."""
    written = [json.loads(line) for line in (HERE / "evolved.jsonl").read_text(encoding="utf-8").splitlines()]
    known = {row["prompt"] for row in written}
    filled = islice((row for row in questions("seen", per_template=600) if row["prompt"] not in known), 20_000)
    between = iter(written)
    while turn := list(islice(filled, TURNS[0])):
        yield from turn
        yield from islice(between, TURNS[1])


def questions(part: str, per_template: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Up to so many different fillings of each template of `part`; one whose gold SQL finds nothing is left out.

    The templates take turns, in an order that the seed shuffles, until a template has no more: any first part is fair.
    """
    spec = yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8"))
    shop, rng = open_shop(), Random(seed)
    slots = {name: _values(shop, given) for name, given in spec["slots"].items()}
    drawn = [
        (turn + rng.random(), {**row, "category": category, "template": f"{category} {number}"})
        for category, templates in spec[part].items()
        for number, template in enumerate(templates, 1)
        for turn, row in enumerate(_fill(template, slots, per_template, rng))
    ]
    asked = set()
    for _, row in sorted(drawn, key=lambda turn: turn[0]):
        found = shop.execute(row["reference"]).fetchall()
        if row["prompt"] not in asked and any(value is not None for line in found for value in line):
            asked.add(row["prompt"])
            yield row


def open_shop() -> sqlite3.Connection:
    """The database, in memory."""
    shop = sqlite3.connect(":memory:")
    shop.executescript((HERE / "shop.sql").read_text(encoding="utf-8"))
    return shop


def _values(shop: sqlite3.Connection, given: Any) -> list[tuple[str, str]]:
    """What a slot can be: pairs of the text in the question and the text in the SQL."""
    if isinstance(given, dict):
        return [(str(shown), str(value)) for shown, value in given.items()]
    if isinstance(given, str):
        given = [row[0] for row in shop.execute(given)]
    return [(str(value), str(value)) for value in given]


def _fill(template: str, slots: dict[str, list[tuple[str, str]]], count: int, rng: Random) -> Iterator[dict[str, str]]:
    """Different fillings of one template. Each is a number, from which its phrasing and its values are read off."""
    sql, *phrasings = template.strip().splitlines()
    names = sorted(set(re.findall(r"\{(\w+)\}", sql)))
    values = [slots[name.rstrip("0123456789")] for name in names]
    different = prod(map(len, values)) * len(phrasings)
    for number in rng.sample(range(different), min(count, different)):
        number, phrasing = divmod(number, len(phrasings))
        chosen = []
        for known in values:
            number, position = divmod(number, len(known))
            chosen.append(known[position])
        if len(set(chosen)) == len(chosen):
            prompt = phrasings[phrasing].format(**{name: shown for name, (shown, _) in zip(names, chosen, strict=True)})
            reference = sql.format(**{name: value for name, (_, value) in zip(names, chosen, strict=True)})
            yield {"prompt": prompt, "reference": reference}


if __name__ == "__main__":
    lines = [json.dumps(row) for row in islice(questions("unseen", per_template=30), 240)]
    (HERE / "unseen.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
