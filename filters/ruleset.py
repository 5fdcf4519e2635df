"""The rules of a recipe, checked and ready: RuleSettings from the recipe's own words, a user's function from its file.

Reads the recipe's `filters.rules` and the Python files they name. Every rule runs on every answer.
"""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec.structs import replace
from pydantic import ConfigDict, Field, ValidationError

from filters.answer import UNVERIFIED, Answer, Checked, RuleSettings, TextSettings, Verified
from filters.duplicates import DEDUP_RULES
from filters.groups import AGREES, SELECT, AgreesSettings
from filters.judgements import JUDGE
from filters.rules import RULES, Rule
from pipeline.errors import DistillError, RecipeError
from pipeline.filters_config import FiltersConfig, RuleConfig
from pipeline.recipe_errors import advice
from pipeline.records import Reason
from pipeline.user_code import load_function

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Verified).decode

PASSED = Verified()
FUNCTION = "function"  # the rule that is a user's own function
# What reports and reviews call the other stages, and the kept answers: no function may have such a name.
TAKEN = (AGREES, UNVERIFIED, JUDGE, *DEDUP_RULES, SELECT, "kept")
CHANGEABLE = ("slots", "reference", "columns", "tools", "tool_calls")  # it gets copies: other rules read them


class FunctionSettings(RuleSettings):
    """A rule of the user's own: `{rule: function, file: my_rules.py, name: no_digits}`; further keys are its arguments.

    The file is looked for beside the recipe. The function takes an Answer (and the further keys by name) and returns
    the reason to drop it, or None; or both in a pair with a score (a number, higher is better). It is imported and run
    as it is: a recipe is trusted as code is.
    """

    file: Path
    name: str = Field(min_length=1)
    model_config = ConfigDict(frozen=True, extra="allow")


class ActiveRule(NamedTuple):
    """One rule of the recipe. `label` names it in reports: the rule's name, with `#reasoning` or `#2` added."""

    label: str
    rule: Rule
    settings: RuleSettings
    reads: str | None = None  # of a rule of text: `text` or `reasoning`

    def described(self) -> dict[str, Any]:
        """Label and every setting, defaults included, for reports and lineage."""
        return {"rule": self.label, **self.settings.model_dump(mode="json")}

    def verify(self, answer: Answer) -> Verified:
        """What this rule says of the answer; a reason is under this rule's label, or under `unverified`.

        A rule of the text has nothing to say of tool calls without text.
        """
        label, rule, settings, reads = self
        if reads == "reasoning":
            answer = replace(answer, text=answer.reasoning)
        elif reads and answer.tool_calls and not answer.text:
            return PASSED
        said = rule.check(answer, settings)
        if said is None:
            return PASSED
        verified = said if isinstance(said, Verified) else Verified(said)
        if verified.reason is None or verified.reason.rule in (label, UNVERIFIED):
            return verified
        return verified._replace(reason=replace(verified.reason, rule=label))


@dataclass(frozen=True)
class RuleSet:
    """All rules of a recipe, in its order."""

    rules: tuple[ActiveRule, ...]

    @property
    def agrees(self) -> AgreesSettings | None:
        """The settings of the rule that compares the answers to a prompt; None: the recipe has no such rule."""
        return next((rule.settings for rule in self.rules if isinstance(rule.settings, AgreesSettings)), None)

    @property
    def verifies(self) -> bool:
        return any(rule.rule.verifies for rule in self.rules)

    @property
    def slow(self) -> bool:
        """Whether a rule may take long: a verifier, or a user's function."""
        return self.verifies or any(isinstance(rule.settings, FunctionSettings) for rule in self.rules)

    def described(self) -> list[dict[str, Any]]:
        """Every rule, with its settings."""
        return [rule.described() for rule in self.rules]

    def files(self, folder: Path) -> list[Path]:
        """The files that the rules' settings name: a function, a database, a schema. `folder`: the recipe's."""
        values = [value for rule in self.rules for value in rule.settings.model_dump().values()]
        named = [folder / value for value in values if isinstance(value, str | Path)]
        return [path for path in named if os.path.isfile(path)]  # noqa: PTH113 (any text)

    def check(self, answer: Answer) -> Checked:
        """What the rules say of an answer, all of them."""
        reasons, scores, result = list[Reason](), dict[str, float](), None
        for rule in self.rules:
            said = rule.verify(answer)
            if said.reason is not None:
                reasons.append(said.reason)
            if said.score is not None:
                scores[rule.label] = said.score
            result = said.result if result is None else result
        return Checked(reasons, scores, result)

    def reasons(self, answer: Answer) -> list[Reason]:
        return self.check(answer).reasons


def load_rules(config: FiltersConfig, recipe_path: Path, slots: set[str] | None = None) -> RuleSet:
    """The recipe's rules, their settings checked.

    `slots` are the slots that the recipe's prompts have, where that is known: `adherence` may name no other.
    Raises RecipeError naming the recipe, filters.rules[i], the key and its value.
    """
    rules: list[ActiveRule] = []
    taken: dict[str, int] = {}
    for index, rule in enumerate(config.rules):
        where = f"{recipe_path}: filters.rules[{index}]"
        known, settings = _load_rule(rule, where, recipe_path)
        if rule.rule in taken and rule.rule == AGREES:
            raise RecipeError(f"{where}: `{AGREES}` stands twice; keep one")
        if rule.rule == "adherence" and slots is not None:
            _check_slots(getattr(settings, "slots", []), slots, where)
        name = settings.name if isinstance(settings, FunctionSettings) else rule.rule
        reads = settings.of if isinstance(settings, TextSettings) else None
        if reads == "reasoning":
            name += "#reasoning"
        taken[name] = taken.get(name, 0) + 1
        rules.append(ActiveRule(name if taken[name] == 1 else f"{name}#{taken[name]}", known, settings, reads))
    return RuleSet(tuple(rules))


def _load_rule(rule: RuleConfig, where: str, recipe_path: Path) -> tuple[Rule, RuleSettings]:
    if rule.rule != FUNCTION and rule.rule not in RULES:
        raise RecipeError(f"{where}: no rule named `{rule.rule}`; there are {', '.join([*RULES, FUNCTION])}")
    model = FunctionSettings if rule.rule == FUNCTION else RULES[rule.rule].settings
    try:
        settings = model.model_validate(rule.model_extra or {}, context={"folder": recipe_path.parent})
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, where, rule.rule, model) for problem in error.errors())) from None
    if isinstance(settings, FunctionSettings):
        if settings.name in TAKEN:
            fix = "give the function another name"
            raise RecipeError(f"{where}.name: the filters use the name `{settings.name}` themselves; {fix}")
        return Rule(_user_function(settings, where, recipe_path.parent), FunctionSettings), settings
    return RULES[rule.rule], settings


def _explain(problem: "ErrorDetails", where: str, rule: str, model: type[RuleSettings]) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = ", ".join(field.alias or name for name, field in model.model_fields.items())
        return f"{where}{key}: the rule `{rule}` has no such setting, got {problem['input']!r}; there are {known}"
    if problem["type"] == "missing":
        return f"{where}{key} is missing; the rule `{rule}` needs it"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{where}{key} {message}{shown}{advice(problem)}" if key else f"{where} ({rule}): {message}"


def _check_slots(wanted: list[str], known: set[str], where: str) -> None:
    for slot in wanted:
        if slot not in known:
            there = f"there are {', '.join(sorted(known))}" if known else "prompts.slots is empty"
            raise RecipeError(f"{where}.slots: the prompts have no slot `{slot}`; {there}")


def _user_function(settings: FunctionSettings, where: str, folder: Path) -> Callable[[Answer, Any], Verified]:
    """Imports the user's function and checks that it can be called with the keys given."""
    path = folder / settings.file
    function = load_function(path, settings.name, f"{where}.file")
    arguments = settings.model_extra or {}
    try:
        inspect.signature(function).bind(None, **arguments)
    except TypeError as error:
        raise RecipeError(f"{where}: {path}: {settings.name}(answer, …): {error}; got {arguments}") from None

    def check(answer: Answer, _: Any) -> Verified:
        copies = {name: msgspec.to_builtins(getattr(answer, name)) for name in CHANGEABLE}
        try:
            said = function(replace(answer, **copies), **arguments)
        except (Exception, SystemExit) as error:  # named with its file, else nobody finds it
            message = f"{path}: {settings.name} raised {type(error).__name__}: {error}"
            raise DistillError(f"{message}; the answer begins with {answer.text[:60]!r}") from error
        try:
            return PASSED if said is None else _as_verified(said, settings.name)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
            wanted = "a reason (text) or None, or a pair of that and a score (a finite number), or a Verified"
            raise DistillError(f"{path}: {settings.name} returned {said!r}; wanted {wanted}") from None

    return check


def _as_verified(said: Any, rule: str) -> Verified:
    """What a user's function returned, as it will be read again from the files. Raises if that is not possible."""
    reason, score, *result = said if isinstance(said, tuple) and len(said) in (2, 3) else (said, None)
    if isinstance(reason, str):
        reason = Reason(rule=rule, note=reason or "no reason given")
    if not isinstance(score, float | int | None) or isinstance(score, bool) or not math.isfinite(score or 0):
        raise ValueError("no score")
    return _decode(_encode(Verified(reason, None if score is None else float(score), *result)))
