"""What a teacher's terms ask of its student: a small, dated table, read from licences.yaml. Not legal advice.

Writes nothing. The table knows makers and families by the model's name, and licences by their name on a card.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
import yaml

from pipeline.checks import Check, Status
from pipeline.models import EMBEDDED, PREFIX

TABLE = Path(__file__).with_name("licences.yaml")
STRICTNESS = ("allowed", "conditions", None, "restricted", "forbidden")  # None: terms that are not known
STATUSES: dict[str, Status] = {"allowed": "pass", "conditions": "note", "restricted": "warn", "forbidden": "fail"}


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    licence: str  # as a card names it
    verdict: Literal["allowed", "conditions", "restricted", "forbidden"]
    asks: str
    source: str
    names: list[str] = []  # patterns for the beginning of a model's name
    student: str = ""  # a pattern for the students that `forbidden` does not hold for
    inherits: bool = False  # a model trained on the answers falls under this licence too


class LicenceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """licences.yaml."""

    read: str  # the month in which the sources were read
    hub: list[str]  # licences that the Hub knows by name; it calls any other `other`
    terms: list[Terms]


@dataclass(frozen=True)
class LicenceChain:
    """The terms of the teacher and of the model that the student was, and what follows for the student."""

    teacher: Terms | None
    base: Terms | None
    new: bool = False  # the student was no model before

    @property
    def answers(self) -> str:
        """The licence of what is made of the teacher's answers alone."""
        return self.teacher.licence if self.teacher and self.teacher.verdict == "allowed" else "other"

    @property
    def student(self) -> str:
        """The licence that both give the student; `other` where a lawyer must decide."""
        if self.new:
            return self.answers
        if self.teacher is None or self.base is None or self.teacher.verdict not in ("allowed", "conditions"):
            return "other"
        if not self.teacher.inherits or self.teacher.licence == self.base.licence:
            return self.base.licence
        return self.teacher.licence if self.base.verdict == "allowed" else "other"


@cache
def licence_table() -> LicenceTable:
    return msgspec.convert(yaml.safe_load(TABLE.read_text(encoding="utf-8")), LicenceTable)


def model_name(reference: str) -> str:
    """The name that a model is published under, as far as its reference tells."""
    embedded = EMBEDDED.get(reference.removeprefix(PREFIX)) if reference.startswith(PREFIX) else None
    return embedded.name if embedded else reference


def terms_of(reference: str, card_licence: str | None = None, stated: str | None = None) -> Terms | None:
    """A model's terms: as the recipe states, or by the model's name, or by its card; None if they are not known."""
    if stated is not None:
        word = "your word in train.teacher_licence"
        terms = Terms(name=stated, licence=stated, verdict="allowed", asks="as you know", source=word)
        return _by_licence(stated) or terms
    name = PurePosixPath(model_name(reference)).name.lower()
    for terms in licence_table().terms:
        if any(re.match(pattern, name) for pattern in terms.names):
            return terms
    return _by_licence(card_licence) if card_licence else None


def strictest(teachers: Mapping[str, Terms | None]) -> str:
    """The model, of several that taught with their terms, whose terms ask the most; the first of equals."""

    def strictness(model: str) -> int:
        terms = teachers[model]
        return STRICTNESS.index(terms.verdict if terms else None)

    return max(teachers, key=strictness)


def licence_check(teacher: str, terms: Terms | None, student: str) -> Check:
    """Whether the teacher's terms let a student learn from its answers, and what they ask of it.

    Terms that are not known stop nobody: a private endpoint's are known to its user alone.
    """
    if terms is None:
        finding = f"the terms of {teacher} are not known to the table of {licence_table().read}; the card will say so"
        fix = "state them in the recipe, in a licence's name or your own words: train.teacher_licence"
        return Check(name="licence", status="note", finding=finding, fix=fix)
    name = PurePosixPath(model_name(student)).name.lower()
    verdict = terms.verdict
    if terms.student and re.match(terms.student, name):  # only what is forbidden to others names a student
        verdict = "conditions"
    finding = f"{teacher}, {terms.name}: {terms.asks} ({terms.source}, read {licence_table().read}; not legal advice)"
    fixes = {"allowed": "", "conditions": "keep to it"}
    fix = fixes.get(verdict, "take another teacher, or state what you agreed on: train.teacher_licence")
    return Check(name="licence", status=STATUSES[verdict], finding=finding, fix=fix)


def on_the_hub(licence: str) -> dict[str, str]:
    """A licence in the form of a card's metadata."""
    if licence in licence_table().hub:
        return {"license": licence}
    return {"license": "other", "license_name": "see-licence-chain" if licence == "other" else licence}


def _by_licence(licence: str) -> Terms | None:
    """The terms of a licence: an entry without names if there is one, since names speak of one family."""
    found = [terms for terms in licence_table().terms if terms.licence == licence.lower()]
    return min(found, key=lambda terms: bool(terms.names), default=None)
