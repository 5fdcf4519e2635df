"""Checks of teacher and student against each other: sizes, chat templates, chain and licence.

Chain: is the teacher itself a student? Models taught by models taught by models collapse (Shumailov et al. 2024).
Reads what is known of both models (train.teacher); writes nothing.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.adapters import MERGED_FROM
from pipeline.advice import BALANCED_SIZES
from pipeline.checks import Check, Status
from pipeline.instructions import INSTRUCTIONS, asked_of_student, told_in_words
from pipeline.lineage import taught_by
from pipeline.reasoning import reasoning_form
from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, Prompt, question_text
from pipeline.train_config import TrainConfig
from pipeline.turns_and_tools import template_turns
from train.checks.licences import Terms, licence_check, strictest, terms_of
from train.checks.run import graded
from train.lazy import Lazy
from train.teacher import Card, known_files, parameters_of, read_card, tokenizer_of

OUR_TAG = "distillate"  # on every card that this tool writes
OTHERS_TAGS = {"distillation", "distilled", "knowledge-distillation"}
SEVERITY = ("pass", "note", "warn", "fail")
MAX_PROMPTS = 200  # distinct prompts rendered; a template that differs does so on the first ones
ROLES = r"\b(?:system|developer|user|human|assistant|model)\b"
MARKS = re.compile(rf"\[/?[A-Z_]+\]|<+/?[\w|▁-]+>+|{ROLES}|[#:]")  # what frames the turns of a chat


def pair_checks(
    recipe: Recipe,
    student: str,
    tokenizer: Any,
    rows: Sequence[Kept],
    lineage: Mapping[str, Any],
    *,
    allow_chain: bool,
) -> Iterator[Check]:
    """All of them. `student`: the folder or Hub id of the student before training, whose `tokenizer` it is.

    `lineage`: the run's, which names every teacher that gave its answers.
    """
    assert recipe.student is not None
    teacher, taught = recipe.teacher.model, taught_by(recipe, lineage)
    known = {name: known_files(name) for name in {teacher, *taught}}
    files = known[teacher]
    told = recipe.student
    asked = Lazy(rows, lambda row: msgspec.structs.replace(row, messages=asked_of_student(row.messages, told)))
    if teacher not in taught:
        yield teacher_check(teacher, taught)
    yield size_check(parameters_of(files, teacher), parameters_of(known_files(student), student))
    yield template_check(tokenizer, tokenizer_of(files), asked, told=told_only(recipe))
    yield markup_check(tokenizer, asked)
    if any(row.tools or row.tool_calls for row in rows):
        yield tools_check(tokenizer, asked)
    if recipe.train.reasoning == "keep":
        yield thoughts_check(tokenizer, recipe.train)
    chains = [chain_check(name, known[name], read_card(known[name]), allowed=allow_chain) for name in taught]
    yield max(chains, key=lambda check: SEVERITY.index(check.status))
    terms = teachers_terms(recipe, {name: known[name] for name in taught})
    decisive = strictest(terms)
    yield licence_check(decisive, terms[decisive], recipe.student.model)


def teachers_terms(recipe: Recipe, known: Mapping[str, Path | None]) -> dict[str, Terms | None]:
    """The terms of models, by their names and what is known of them (train.teacher.known_files)."""
    stated = recipe.train.teacher_licence
    return {name: terms_of(name, read_card(folder).licence, stated) for name, folder in known.items()}


def teacher_check(teacher: str, answered: Sequence[str]) -> Check:
    """Warns that the recipe's teacher gave none of the answers: it is what an evaluation would compare with."""
    finding = f"{' and '.join(answered)} gave the answers, not the recipe's teacher, {teacher}"
    fix = f"name it in the recipe, or give it to every stage as to generate: TEACHER_URL=… TEACHER_MODEL={answered[0]}"
    return Check(name="teacher", status="warn", finding=finding, fix=fix)


def size_check(teacher: int | None, student: int | None) -> Check:
    """Teacher's parameters over the student's: 3 to 10 is balanced."""
    if teacher is None or student is None:
        finding = f"the {'teacher' if teacher is None else 'student'}'s size is not known"
        return Check(name="size_ratio", status="note", finding=finding)
    ratio, (low, high) = teacher / student, BALANCED_SIZES
    finding = f"teacher {_size(teacher)}, student {_size(student)}: {ratio:.1f} times; {low} to {high} is balanced"
    status: Status = "fail" if ratio < 1 else "warn" if ratio > high else "note"
    fix = "a smaller student saves more"
    if ratio < 1:
        fix = "a student cannot learn to be better than its teacher; swap the models"
    elif ratio > high:
        fix = f"a {_size(teacher)} teacher is too far for a {_size(student)} student; take a size between"
    return graded("size_ratio", ratio, finding, passes=low <= ratio <= high, otherwise=status, fix=fix)


def told_only(recipe: Recipe) -> str:
    """In words, what the teacher was told and the student is not; empty if both are told the same."""
    told, system = told_in_words(recipe.teacher), recipe.student.system if recipe.student else None
    if not told and system is None:
        return ""
    own = {None: "the prompts as they are", "": "the prompts without a system message"}
    asked = own.get(system, "the prompts with a system message of its own")
    teacher = f"only the teacher was told {told}" if told else "the teacher was asked the prompts as they are"
    return f"{teacher}; the student is asked {asked}"


def template_check(student: Any, teacher: Any | None, rows: Iterable[Kept | Prompt], *, told: str = "") -> Check:
    """Both chat templates should render a prompt alike, the system message included, unless the teacher is told more.

    Models with the same tokens must make the same text of it; if not, a template is broken, or only one adds a system
    message. Models of different families frame turns with other tokens, which does no harm. Words that only one of
    them adds do harm.
    """
    prompts = _distinct(rows)
    own = [_render(student, messages) for messages in prompts]
    if refused := next((text for text in own if isinstance(text, Exception)), None):
        finding = f"the student's chat template cannot render a prompt: {refused}"
        fix = "change the prompts, or the student"
        if any(messages[0]["role"] in INSTRUCTIONS for messages in prompts):
            fix = 'set student.system: "" if it takes no system message (no answer is asked anew for that), or ' + fix
        return Check(name="templates", status="fail", value=0, finding=finding, fix=fix)
    if told or teacher is None:
        finding = "the teacher's chat template is not known here; it answered the messages as its endpoint renders them"
        return Check(name="templates", status="note", finding=told or finding)
    pairs = [(text, _render(teacher, messages), messages) for text, messages in zip(own, prompts, strict=True)]
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    share = 1 - len(differing) / len(prompts)
    finding = f"{len(prompts) - len(differing)} of {len(prompts)} prompts are rendered alike by teacher and student"
    if not differing:
        return Check(name="templates", status="pass", value=share, finding=finding)
    one_vocabulary = student.get_vocab() == teacher.get_vocab()
    status: Status = "fail" if one_vocabulary else "warn"
    ours, theirs, messages = differing[0]
    said, heard = _added(student, messages, str(ours)), _added(teacher, messages, str(theirs))
    if said != heard:
        finding = f"only {finding}: the teacher's template adds {heard!r}, the student's {said!r}"
        fix = "give prompts.system, which replaces the system message of both, and generate again"
    elif one_vocabulary:
        finding = f"only {finding}, though both models know the same tokens"
        fix = "copy the teacher's chat_template.jinja into the student's folder"
    else:
        status, fix = "note", ""
        finding = "the same words in other control tokens: each is asked with its own template"
    return Check(name="templates", status=status, value=share, finding=finding, fix=fix)


def markup_check(student: Any, rows: Sequence[Kept]) -> Check:
    """Text that spells one of the student's control tokens would become that token, and end a turn in its middle."""
    unnamed = (token.content for token in student.added_tokens_decoder.values() if token.special)
    tokens = sorted(filter(None, {*student.all_special_tokens, *unnamed}))
    pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    texts = ((row.id, "\n".join([row.text, *(message.content for message in row.messages)])) for row in rows)
    found = [f" (the first, {name}: {match[0]})" for name, text in texts if (match := pattern.search(text))]
    finding = f"{len(found)} of {len(rows)} rows spell a control token of the student{found[0] if found else ''}"
    fix = "they are of another chat format; drop them with the rule banned_words"
    return graded("markup", len(found), finding, passes=not found, otherwise="fail", fix=fix)


def tools_check(student: Any, rows: Iterable[Kept]) -> Check:
    """With a template that leaves out calls or their results, the student would learn from half a conversation.

    Some templates refuse several calls in one turn: of each number of calls a conversation is rendered.
    """
    from trl.chat_template_utils import supports_tool_calling

    able = supports_tool_calling(student)
    finding = f"the student's chat template {'renders' if able else 'does not render'} tool calls and their results"
    fix = "choose a student whose template does, as Qwen2.5's"
    conversations: dict[int, list[Message]] = {}
    for row in rows if able else ():
        turns = [*row.messages, Message(role="assistant", content=row.text, tool_calls=row.tool_calls)]
        conversations.setdefault(max(len(turn.tool_calls) for turn in turns), turns)
    for calls, turns in conversations.items():
        if isinstance(error := _render(student, template_turns(turns)), Exception):
            able, finding = False, f"the student's chat template refuses a turn with {calls} tool calls: {error}"
            fix += ", or drop such answers: {rule: tool_calls, max_calls: 1}"
            break
    return graded("tools", float(able), finding, passes=able, otherwise="fail", fix=fix)


def thoughts_check(student: Any, config: TrainConfig) -> Check:
    """With a template that drops what was thought, the student would learn the answers alone, against the recipe."""
    able = reasoning_form(config, student) is not None
    finding = f"the student's chat template {'renders' if able else 'drops'} the reasoning before an answer"
    fix = "name a template that renders it in student.chat_template, as chatml, or set train.reasoning: strip"
    return graded("thoughts", float(able), finding, passes=able, otherwise="fail", fix=fix)


def chain_check(reference: str, folder: Path | None, card: Card, *, allowed: bool = False) -> Check:
    """Fails for a product of this tool unless `allowed`; warns for a model that others call distilled."""
    status: Status = "warn"
    finding, fix = f"no sign that the teacher {reference} was distilled", "distil from the first teacher instead"
    if origin := _ours(folder, card):
        status = "note" if allowed else "fail"
        finding = f"the teacher {reference} is itself a distilled student: {origin}"
        fix += ", or accept the risk of collapse with --allow-chain"
    elif tags := sorted(card.tags & OTHERS_TAGS):
        finding = f"the makers of the teacher {reference} tag it {', '.join(tags)}"
    elif "distill" in Path(reference).name.lower():
        finding = f"the teacher {reference} was distilled by its makers: its name says so"
    elif folder is None:
        finding = f"nothing is known of {reference} here; an API does not say whether its model was distilled"
        return Check(name="chain", status="note", finding=finding)
    else:
        return Check(name="chain", status="pass", value=0, finding=finding)
    return Check(name="chain", status=status, value=1, finding=finding, fix=fix)


def _ours(folder: Path | None, card: Card) -> str:
    """What shows that this tool made the model; empty if nothing does."""
    if folder is not None:
        try:
            trained = json.loads((folder / "lineage.json").read_bytes())["train"]
            return f"its lineage.json names {trained['teacher']} as its teacher"
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no lineage of ours
        if (folder / MERGED_FROM).is_file():
            return f"{MERGED_FROM} in its folder"
    return f"its card is tagged {OUR_TAG}" if OUR_TAG in card.tags else ""


def _distinct(rows: Iterable[Kept | Prompt]) -> list[list[dict[str, Any]]]:
    conversations: dict[str, list[Message]] = {}
    for row in rows:
        conversations[question_text(row.messages)] = row.messages
        if len(conversations) == MAX_PROMPTS:
            break
    return [template_turns(messages) for messages in conversations.values()]


def _render(tokenizer: Any, messages: list[dict[str, Any]]) -> str | Exception:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:  # a template refuses a role, or an order of roles
        return error


def _added(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> str:
    """The words of a rendered prompt that are neither the messages' nor frame the turns."""
    for message in messages:
        if (content := message["content"].strip()) not in text:
            return f"nothing of the {message['role']} message"
        text = text.replace(content, " ", 1)
    for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True):
        text = text.replace(token, " ")
    return " ".join(MARKS.sub(" ", text).split())


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"
