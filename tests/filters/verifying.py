"""What the tests of the verifiers share: one rule's word on one answer, and a small shop."""

from pathlib import Path
from typing import Any

from filters.answer import Answer, RuleSettings, Verified, nfc
from filters.rules import RULES

SHOP = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, total REAL);
INSERT INTO customers VALUES (1, 'Ada', 'Oslo'), (2, 'Bo', 'Bonn'), (3, 'Cy', 'Oslo');
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
INSERT INTO orders SELECT i, i % 3 + 1, (i * 7919 % 10000) / 100.0 FROM n;
"""


def settings_of(rule: str, folder: Path = Path(), **settings: Any) -> RuleSettings:
    """A rule's settings as a recipe in that folder would have them."""
    return RULES[rule].settings.model_validate(settings, context={"folder": folder})


def verify(rule: str, text: str, settings: RuleSettings, reference: Any = None, **columns: Any) -> Verified:
    """What a rule says of an answer."""
    answer = Answer(nfc(text), "", "stop", {}, reference=reference, columns=columns)
    said = RULES[rule].check(answer, settings)
    assert isinstance(said, Verified)
    return said


def outcome(said: Verified) -> str:
    """`passes`, or the rule that drops the answer and what it looked at."""
    return "passes" if said.reason is None else f"{said.reason.rule} {said.reason.what}".strip()
