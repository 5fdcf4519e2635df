"""The recipe's `filters` section: which answers are worth learning from."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.section import BudgetConfig, OtherModelConfig, Section

Selection = Literal["all", "first", "best", "shortest", "agreed"]
RUBRIC = {
    "fluency": "the language is the request's own, natural and without errors",
    "request": "it does what the request asks, all of it, and nothing else",
    "audience": "it fits those it is for, in words, length and content",
    "coherence": "one thing follows from another, and it comes to an end",
    "facts": "nothing in it is false or invented where the truth matters",
}


class RuleConfig(BaseModel):
    """One filter rule: its name and its own settings, which `filters` checks."""

    model_config = ConfigDict(frozen=True, extra="allow")
    rule: str

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, given: Any) -> Any:
        if not isinstance(given, dict | RuleConfig):
            raise ValueError("takes the rule's name and its settings, as in `{rule: length, min_chars: 10}`")
        return given


class DedupConfig(Section):
    """Which answers count as duplicates. Only answers that the rules keep are compared."""

    exact: bool = True
    """Drop answers that differ only in case, spaces, punctuation and symbols."""
    near: float | None = Field(0.8, ge=0.5, le=1)
    """Drop answers whose n-grams are at least this similar (Jaccard); null: keep near duplicates."""
    ngram: int = Field(3, ge=1, le=20)
    """Characters per n-gram."""
    prompts: float | None = Field(None, ge=0.5, le=1)
    """Drop answers to prompts that are at least this similar; 1: only to the same prompt; null: keep them."""
    against: list[Path] = Field([])
    """Other runs: answers like those that they kept are dropped."""
    of: Literal["answer", "row"] | None = None
    """What is compared: the answer, or prompt and answer as one text; null: `row` if a rule verifies answers."""
    contamination: list[Path] = Field([])
    """Runs (their validation and test rows) or JSONL files of prompts: answers to prompts like these are dropped."""

    @model_validator(mode="after")
    def _exact_with_near(self) -> "DedupConfig":
        if self.near is not None and not self.exact:
            raise ValueError("`exact: false` needs `near: null`: what is the same is also nearly the same")
        return self


class JudgeConfig(OtherModelConfig):
    """A model that scores each answer from 1 to 5 against a rubric."""

    budget: BudgetConfig = BudgetConfig()
    """What judging may spend, apart from the budget of the run."""
    rubric: dict[str, str] = Field(RUBRIC, min_length=1)
    """What is scored: a name for each criterion, and what it means."""
    min_score: int = Field(3, ge=1, le=5)
    """An answer whose overall score is below this is dropped."""
    max_tokens: int = Field(200, ge=16)
    """Tokens of a verdict, at most."""
    seed: int = 0
    """Seed of the judge's sampling."""
    attempts: int = Field(3, ge=1)
    """How often an answer is judged whose verdict cannot be read."""
    schema_: bool = Field(True, alias="schema")
    """Ask for JSON by a schema; false for an endpoint that does not support it."""

    @field_validator("rubric")
    @classmethod
    def _plain_names(cls, rubric: dict[str, str]) -> dict[str, str]:
        for name in rubric:
            if not name.isidentifier() or name in ("score", "reason"):
                raise ValueError(f"name {name!r} must be a plain word other than score and reason")
        return rubric


class FiltersConfig(Section):
    """Which answers are worth learning from."""

    rules: list[RuleConfig] = Field([])
    """The rules in order, each with its settings; docs/filters.md describes them."""
    dedup: DedupConfig | None = None
    """How duplicates are found; null: they stay."""
    select: Selection = "all"
    """Which of a prompt's kept answers stay: all, or one: the first, the best by its scores, …"""
    preferences: int = Field(0, ge=0)
    """Pairs of a kept and a failed answer, at most, that preferences.jsonl gets for each prompt; 0: no such file."""
    judge: JudgeConfig | None = None
    """A model that scores what the rules keep; null: the rules alone decide."""
    warn_keep_rate: float = Field(0.5, ge=0, le=1)
    """Warn if a smaller share of the answers is kept."""
    min_keep_rate: float | None = Field(None, ge=0, le=1)
    """End with exit code 1 if a smaller share of the answers is kept; null: never."""

    @property
    def rules_digest(self) -> str:
        """Tells the rules of the recipe from those it had before."""
        rules = self.model_dump(mode="json")["rules"]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]
