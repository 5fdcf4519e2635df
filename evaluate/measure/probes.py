"""The prompts that every model answers for the report, none of which any model was trained on.

Reads the recipe, the run's prompts.jsonl and the test rows; writes nothing. Two parts:

    seen      `evaluate.probes_file`; without one, combinations of the template's slot values that no prompt of the run
              had; without a template, or if every combination was asked, the test prompts, whether the
              filters kept their answers or not
    unseen    prompts with the values of `evaluate.unseen`, which the recipe's slots do not have

The same recipe, run and seed give the same probes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, islice
from typing import Literal

import msgspec

from generate.grammar import Grammar, shuffled
from generate.prompts import PromptRow, iter_prompts, make_prompt, prompt_id
from pipeline.errors import DataError, UsageError
from pipeline.prompts_config import ChooseSlot, PromptsConfig
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt, Slots, asked_fields, question_text, read_jsonl
from pipeline.rundir import RunDir


@dataclass(frozen=True)
class ProbePrompts:
    """What is asked, by part."""

    source: Literal["slots", "file", "test"]  # of the seen part
    seen: list[Prompt]
    unseen: list[Prompt] = field(default_factory=list)
    note: str = ""  # what a reader should know of how they were chosen

    @property
    def all(self) -> list[Prompt]:
        return [*self.seen, *self.unseen]


class KnownQuestions:
    """The questions that a run has asked, whatever their spacing and case, and the values of their slots."""

    def __init__(self, prompts: Iterable[Prompt | Kept]) -> None:
        self._known: set[int] = set()  # hashes of questions, and of combinations of values
        self.values: dict[str, set[str]] = {}  # that each slot has had
        for prompt in prompts:
            self._known |= {hash(question_text(prompt.messages)), hash(_combination(prompt.slots))}
            for name in prompt.slots:
                self.values.setdefault(name, set()).update(_values(prompt.slots, name))

    def has(self, prompt: Prompt) -> bool:
        """Whether these words were asked."""
        return hash(question_text(prompt.messages)) in self._known

    def has_combination(self, prompt: Prompt) -> bool:
        """Whether a prompt of any template had these values, in any order."""
        return hash(_combination(prompt.slots)) in self._known


def choose_probes(recipe: Recipe, run: RunDir, test_rows: Sequence[Kept]) -> ProbePrompts:
    """At most `evaluate.probes` prompts of the seen part and `evaluate.unseen_probes` of the unseen one.

    Raises UsageError if a prompt of the run has a value that should be unseen, DataError if the run has asked a prompt
    of `evaluate.probes_file`.
    """
    config = recipe.evaluate
    asked = KnownQuestions(chain(_asked_in(run), test_rows))
    unseen = list(islice(_unseen(recipe, asked), config.unseen_probes)) if config.unseen else []
    if not config.probes:
        return ProbePrompts("slots", [], unseen)
    if config.probes_file is not None:
        return ProbePrompts("file", _from_file(recipe, asked, config.probes), unseen)
    note = ""
    if recipe.prompts.template is not None:
        seen = list(islice(_fresh(recipe.prompts, asked, f"probes:{config.seed}"), config.probes))
        if seen:
            if len(seen) < config.probes:
                note = f"Only {len(seen)} combinations of the slots were left for probes, of {config.probes} wanted."
            return ProbePrompts("slots", seen, unseen, note)
        note = "Every combination of the slots was asked, so the probes are the test prompts."
    return ProbePrompts(
        "test", _sample(_test_prompts(recipe, run, test_rows), config.probes, config.seed), unseen, note
    )


def choose_questions(recipe: Recipe, run: RunDir, test_rows: Sequence[Kept] = ()) -> ProbePrompts:
    """What `evaluate.verify` is asked of: the run's test prompts, and those of `evaluate.probes_file` as unseen.

    The test prompts were set apart before anything was filtered, so those are among them whose answers were dropped.
    Where some have a reference, those without (the teacher wrote them, say) are left out: nothing can tell whether an
    answer to them is right. Raises DataError if there is none, if prompts are in another part than when they were made
    or the student was trained (it may have been trained on them), if none has the column `evaluate.category`, or if the
    run has asked a prompt of the file.
    """
    config = recipe.evaluate
    if not config.verify:
        return ProbePrompts("test", [])
    test = dict[str, Prompt]()
    tested = set() if recipe.train.test_rows else {question_text(row.messages) for row in test_rows}
    for prompt in read_jsonl(run.prompts, Prompt):
        part = recipe.prompts.part_of(prompt)  # as train does
        if prompt.part not in (None, part):
            raise DataError(
                f"{run.prompts}: the parts of the prompts have changed since generate (prompts.test, validation, seed "
                "or group); run generate again, which asks for nothing that is there, and train again"
            )
        text = question_text(prompt.messages)
        if part == "test":
            test[text] = prompt
        elif text in tested:
            raise DataError(
                f"{run.prompts}: values of {recipe.prompts.group!r} (prompts.group) have changed since training, and "
                f"with them the parts: {prompt.messages[-1].content[:60]!r} was a test prompt; train again"
            )
    if not test:
        raise DataError(
            f"{run.prompts}: no test prompts for evaluate.verify; raise prompts.test or prompts.count, or "
            "take another prompts.seed"
        )
    if any(prompt.reference is not None for prompt in test.values()):
        test = {text: prompt for text, prompt in test.items() if prompt.reference is not None}
    check_category(recipe, test.values())
    unseen = []
    if config.probes_file:
        unseen = _from_file(recipe, KnownQuestions(_asked_in(run)), config.verify_count)
    return ProbePrompts("test", _sample(list(test.values()), config.verify_count, config.seed), unseen)


def check_category(recipe: Recipe, prompts: Iterable[Prompt]) -> None:
    """Raises DataError if none of the prompts has the column `evaluate.category`."""
    category, there = recipe.evaluate.category, dict[str, None]()
    if category is None:
        return
    for prompt in prompts:
        if recipe.prompts.category_of(prompt, category) is not None:
            return
        there |= dict.fromkeys((*prompt.columns, *prompt.slots))
    raise DataError(
        f"evaluate.category: no test prompt has a value under {category!r}; there are {', '.join(there) or 'none'}"
    )


def _asked_in(run: RunDir) -> Iterator[Prompt | Kept]:
    """The prompts of the run, and those of its kept rows: an earlier recipe may have asked more."""
    if run.prompts.is_file():
        yield from read_jsonl(run.prompts, Prompt)
    if run.kept.is_file():
        yield from read_jsonl(run.kept, Kept)


def _test_prompts(recipe: Recipe, run: RunDir, test_rows: Sequence[Kept]) -> list[Prompt]:
    """The run's different test prompts, also those whose answers the filters dropped.

    Those of the test rows alone if `train.test_rows` gives them, or no prompt of the run is in the test part.
    """
    prompts: Iterable[Prompt] = ()
    if recipe.train.test_rows is None and run.prompts.is_file():
        prompts = (prompt for prompt in read_jsonl(run.prompts, Prompt) if recipe.prompts.part_of(prompt) == "test")
    found = {question_text(prompt.messages): prompt for prompt in prompts}
    if not found:
        of_rows = (Prompt(id=row.prompt_id, **asked_fields(row)) for row in test_rows)
        found = {question_text(prompt.messages): prompt for prompt in of_rows}
    return list(found.values())


def _fresh(config: PromptsConfig, asked: KnownQuestions, key: str) -> Iterator[Prompt]:
    """The template's prompts that were not asked, in an order that the key decides."""
    grammar = Grammar(config)
    for index in range(grammar.size):
        text, slots = grammar.at(shuffled(index, grammar.size, key))
        row = PromptRow(prompt=text, slots=slots, reference=grammar.reference(slots))
        prompt = make_prompt(row, config)
        if not asked.has(prompt) and not asked.has_combination(prompt):
            yield prompt


def _unseen(recipe: Recipe, asked: KnownQuestions) -> Iterator[Prompt]:
    """Prompts in which every slot named in `evaluate.unseen` has a new value; of several values, at least one."""
    config = recipe.evaluate
    for name, values in config.unseen.items():
        if known := sorted(asked.values.get(name, set()) & set(values)):
            raise UsageError(
                f"evaluate.unseen.{name}: prompts of this run have {known[0]!r}; give a value that none has"
            )
    slots: dict[str, list[str] | ChooseSlot] = {}
    for name, slot in recipe.prompts.slots.items():
        new = config.unseen.get(name)
        if new and isinstance(slot, ChooseSlot):
            slots[name] = ChooseSlot(choose=slot.choose, from_=[*slot.from_, *new])
        else:
            slots[name] = new or slot
    for prompt in _fresh(recipe.prompts.model_copy(update={"slots": slots}), asked, f"unseen:{config.seed}"):
        if all(set(_values(prompt.slots, name)) & set(values) for name, values in config.unseen.items()):
            yield prompt


def _from_file(recipe: Recipe, asked: KnownQuestions, count: int) -> list[Prompt]:
    """Prompts of `evaluate.probes_file`, with ids made of their questions: the run may have the file's own ids, too."""
    config, prompts = recipe.evaluate, read_probes(recipe)
    if known := [prompt for prompt in prompts if asked.has(prompt)]:
        first = " ".join(known[0].messages[-1].content.split())[:60]
        raise DataError(
            f"{config.probes_file}: {len(known)} of its {len(prompts)} prompts are prompts of this run, the first "
            f"{first!r}; take them out, or the models are asked what the student was trained on"
        )
    own = [msgspec.structs.replace(prompt, id=prompt_id(prompt.messages, prompt.tools)) for prompt in prompts]
    return _sample(own, count, config.seed)


def read_probes(recipe: Recipe) -> list[Prompt]:
    """The different prompts of `evaluate.probes_file`. Raises DataError if it cannot be read, or a row is wrong."""
    same = recipe.prompts.model_dump(include={"system", "columns", "json_columns", "tools"})
    wanted = PromptsConfig(file=recipe.evaluate.probes_file, **same)
    rows = iter_prompts(recipe.model_copy(update={"prompts": wanted}))
    try:
        return list({question_text(prompt.messages): prompt for prompt in rows}.values())
    except DataError as error:
        raise DataError(str(error).replace("prompts.file", "evaluate.probes_file")) from None


def _sample(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` of the prompts; the choice does not depend on their order."""
    return sorted(prompts, key=lambda prompt: blake2b(f"{seed}:{prompt.id}".encode()).digest())[:count]


def _values(slots: Slots, name: str) -> list[str]:
    value = slots[name]
    return [value] if isinstance(value, str) else value


def _combination(slots: Slots) -> str:
    return repr(sorted((name, sorted(_values(slots, name))) for name in slots))
