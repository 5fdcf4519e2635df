"""`python -m filters.evolve RECIPE`: the teacher writes more prompts, and harder ones, from the recipe's own.

Each round asks for a rewriting of every prompt there is: with a further constraint, deeper, more concrete or with more
steps of reasoning (Evol-Instruct, arXiv 2304.12244), or for a new prompt of the same kind, after three examples of the
recipe's own (Self-Instruct, arXiv 2212.10560). Replies that are no prompt, and prompts nearly the same as an earlier
one, are left out.

Reads the recipe. A round is a run of `generate` in `<run>/evolve/<round>/`, so that a call that was killed goes on, and
no prompt is bought twice; the rounds together keep to the recipe's budget. Writes `<run>/evolved.jsonl`, which
`prompts.file` of another recipe names, and `<run>/evolve/report.json`.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from filters.diversity import WORDS, Distinct, Diversity, diversity
from generate.budget import shared_budget
from generate.context import asked_rows
from generate.prompts import iter_prompts, prompt_id
from generate.run import generate
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import BudgetReached, RequestsFailed, UsageError
from pipeline.instructions import INSTRUCTIONS
from pipeline.progress import reporting
from pipeline.prompts_config import PromptsConfig, value_of
from pipeline.recipe import Recipe
from pipeline.records import Completion, Message, Prompt, question_text, said
from pipeline.rundir import RunDir, write_json, write_jsonl

ROUNDS = 2
NEAR = 0.7  # Jaccard: the default threshold (Self-Instruct leaves out a ROUGE-L of 0.7 and more)
EXAMPLES = 3  # of the recipe's own prompts, for a new one
FAMILY = "family"  # the column that a prompt and all that were made of it share, unless the recipe names its own group

HARDER = {
    "constraint": "Add one constraint or requirement to it.",
    "depth": "Let it ask for more depth and breadth about the same matter.",
    "concrete": "Put more specific things in place of the general ones in it.",
    "reasoning": "If it can be answered in few steps, change it so that it takes several steps of reasoning.",
}
NEW = "new"
WAYS = (*HARDER, NEW)
REWRITE = """{around}Rewrite a request that somebody makes of a language model. {how} It must remain a request that \
people can make and a model can answer, at most 20 words longer than now.

<request>
{request}
</request>

{reply}"""
INVENT = """{around}These are requests that people make of a language model:
{examples}
Write one new request of the same kind, as long and as difficult as these, about something else.

{reply}"""
# first, because an endpoint computes once what its requests begin with alike
ABOUT = "Whoever answers a request is told this, and must be able to answer it:\n<told>\n{told}\n</told>\n\n"
BEFORE = "This was said before the request:\n<before>\n{before}\n</before>\n\n"
REPLY = "Do not answer it. Reply with <request>, the new request, </request>, and nothing else."

# Fields of sampling.extra that are left out here: they need tools, which these questions lack, or shape the answers.
OF_ANSWERS = ("tool_choice", "parallel_tool_calls", "response_format", "structured_outputs")

_TAGGED = re.compile(r"<request>(.*?)(?:</request>|$)", re.DOTALL)
_AROUND = re.compile(r"^\W*(?:new|rewritten) (?:request|prompt)\W*:\s*|^[\"“]|[\"”]$", re.IGNORECASE)
_OF_THE_TASK = re.compile(
    r"\b(?:given|rewritten|revised|new) (?:request|prompt)\b|\bdo not answer it\b|"
    r"^(?:sure|certainly|of course|here(?:'s|’s| is| are))\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(r"^(?:i'm|i am|i’m)?\s*sorry\b|^i (?:cannot|can't|can’t)\b|^as an ai\b", re.IGNORECASE)


class Question(NamedTuple):
    """What the teacher is asked, to make another prompt of `parent`."""

    parent: Prompt
    way: str  # one of WAYS
    asked: Prompt


class Round(msgspec.Struct, frozen=True, kw_only=True):
    asked: int
    failed: int  # for good: no answer
    new: int
    left_out: Counter[str]  # by the reason


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What evolved.jsonl holds, and how different the prompts were and are: in equally many, drawn at random."""

    seeds: int
    prompts: int  # the seeds among them
    rounds: list[Round]
    before: Diversity
    after: Diversity


def evolve(
    recipe: Recipe,
    run: RunDir,
    *,
    rounds: int = ROUNDS,
    most: int | None = None,
    near: float = NEAR,
    quiet: bool = False,
) -> Report:
    """Writes the recipe's prompts and those made of them, `most` in all (None: as many as `rounds` bring).

    A request that failed for good in an earlier call is made again. Raises UsageError if `rounds` or `most` leave
    nothing to ask, and what `generate` raises: the next call goes on. At the end of the budget what there is by then is
    written first.
    """
    group = recipe.prompts.group or FAMILY
    families = dict[str, str]()  # by the question, which may stand in several rows
    seeds = list({prompt.id: _of_family(prompt, group, families) for prompt in iter_prompts(recipe)}.values())
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {rounds}")
    if most is not None and most <= len(seeds):
        raise UsageError(f"--most counts the recipe's own {len(seeds)} prompts, too, and must be over that; got {most}")
    folder = run.path / "evolve"
    folder.mkdir(parents=True, exist_ok=True)
    prompts, distinct, done = seeds[:], Distinct(near), list[Round]()
    for seed in seeds:
        distinct.add(said(seed.messages[-1]), always=True)
    known, stopped = set[str](), None  # the questions of all rounds: none is asked twice
    while not stopped and len(done) < rounds and (most is None or len(prompts) < most):
        number, lacking = len(done) + 1, len(prompts) if most is None else most - len(prompts)
        asked = RunDir(folder / str(number), internal=True, first=number == 1)
        parents = [prompt for prompt in prompts if prompt.messages[-1].role == "user"]  # not a tool's result
        made = (question(parent, seeds, number, recipe) for parent in parents[-lacking:])
        questions = {one.asked.id: one for one in made if one.asked.id not in known}
        known |= questions.keys()
        if not questions:
            break
        asking = _recipe_of_round(recipe, asked, [one.asked for one in questions.values()])
        failed = 0
        try:
            failed = generate(asking, asked, quiet=quiet, retry_failures=True).failed  # what is not answered yet
        except BudgetReached as error:
            stopped = error
        answers = {request.prompt_id: answer for request, answer in asked_rows(asking, asked.completions, Completion)}
        replies = questions.values() if quiet else reporting(questions.values(), "{:,} replies looked at so far".format)
        new, left_out = _new_prompts(replies, answers, distinct, number, group)
        prompts += new
        done.append(Round(asked=len(questions), failed=failed, new=len(new), left_out=left_out))
    write_jsonl(run.path / "evolved.jsonl", prompts)
    report = _report(seeds, prompts, done)
    write_json(folder / "report.json", report)
    if stopped:
        raise BudgetReached(f"{stopped}; {len(prompts)} prompts are in {run.path / 'evolved.jsonl'}")
    return report


def question(parent: Prompt, seeds: Sequence[Prompt], number: int, recipe: Recipe) -> Question:
    """What a round asks about a prompt. Only these decide it, so that a second call asks the same."""
    rng = random.Random(parent.id)
    way = rng.sample(WAYS, len(WAYS))[(number - 1) % len(WAYS)]
    earlier = parent.messages[:-1]
    told = [recipe.teacher.system or "", *(said(turn) for turn in earlier if turn.role in INSTRUCTIONS)]
    before = [f"{turn.role}: {said(turn)}" for turn in earlier if turn.role not in INSTRUCTIONS]
    around = ABOUT.format(told="\n\n".join(filter(None, told))) if any(told) else ""
    if before:
        around += BEFORE.format(before="\n".join(before))
    if way == NEW:
        examples = [said(one.messages[-1]) for one in (parent, *rng.sample(seeds, min(EXAMPLES - 1, len(seeds))))]
        text = INVENT.format(
            examples="\n".join(f"<request>\n{one}\n</request>" for one in examples), around=around, reply=REPLY
        )
    else:
        text = REWRITE.format(how=HARDER[way], request=said(parent.messages[-1]), around=around, reply=REPLY)
    messages = [Message(role="user", content=text)]
    return Question(parent, way, Prompt(id=prompt_id(messages), messages=messages))


def read_prompt(answer: Completion) -> tuple[str, str | None]:
    """The prompt in a reply, and why it is none (None: it is one)."""
    tagged = _TAGGED.search(answer.text)
    text = _AROUND.sub("", (tagged[1] if tagged else answer.text).strip()).strip()
    if answer.finish_reason == "length":
        return text, "cut"
    if not text:
        return text, "empty"
    if _OF_THE_TASK.search(text):
        return text, "talks_of_the_task"
    return text, "refusal" if _REFUSAL.search(text) else None


def _recipe_of_round(recipe: Recipe, asked: RunDir, questions: Sequence[Prompt]) -> Recipe:
    """The recipe of a round, whose questions it writes beside the round's folder."""
    folder = asked.path.parent
    file = folder / f"{asked.path.name}.questions.jsonl"
    write_jsonl(file, questions)
    others = [RunDir(path) for path in folder.iterdir() if path.is_dir() and path != asked.path]
    extra = {name: value for name, value in recipe.sampling.extra.items() if name not in OF_ANSWERS}
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-evolve-{asked.path.name}",
            "teacher": recipe.teacher.told_nothing(),
            "prompts": PromptsConfig(file=file),
            "sampling": recipe.sampling.model_copy(update={"logprobs": None, "extra": extra}),
            "budget": shared_budget(recipe.budget, others),
        }
    )


def _new_prompts(
    questions: Iterable[Question], answers: dict[str, Completion], distinct: Distinct, number: int, group: str
) -> tuple[list[Prompt], Counter[str]]:
    """The prompts that a round's replies make, in the order of its questions; and what is left out, by the reason."""
    found, left_out = list[Prompt](), Counter[str]()
    for parent, way, asked in questions:
        if asked.id not in answers:
            continue
        text, wrong = read_prompt(answers[asked.id])
        if wrong is None and not distinct.add(text):
            wrong = "near_duplicate"
        if wrong:
            left_out[wrong] += 1
            continue
        messages = [*parent.messages[:-1], Message(role="user", content=text)]
        columns = {"evolved": {"from": parent.id, "way": way, "round": number}, group: parent.columns[group]}
        tools = parent.tools
        found.append(Prompt(id=prompt_id(messages, tools), messages=messages, columns=columns, tools=tools))
    return found, left_out


def _of_family(seed: Prompt, group: str, families: dict[str, str]) -> Prompt:
    """A prompt of the recipe, with what its children will share with it: its group, or else the id of its question."""
    given = value_of(seed, group)
    if given is None:
        given = families.setdefault(question_text(seed.messages), seed.id)
    return msgspec.structs.replace(seed, columns={**seed.columns, group: given})


def _report(seeds: Sequence[Prompt], prompts: Sequence[Prompt], rounds: list[Round]) -> Report:
    before, after = (diversity([said(prompt.messages[-1]) for prompt in some], len(seeds)) for some in (seeds, prompts))
    return Report(seeds=len(seeds), prompts=len(prompts), rounds=rounds, before=before, after=after)


def describe(report: Report, path: Path) -> list[str]:
    lines = []
    for number, one in enumerate(report.rounds, start=1):
        why = "".join(f", {count:,} {reason.replace('_', ' ')}" for reason, count in sorted(one.left_out.items()))
        lines.append(f"round {number}: {one.asked:,} asked, {one.new:,} new, {one.failed:,} failed{why}")
    for when, found in (("before", report.before), ("after", report.after)):
        distinct, alike = ("-" if value is None else f"{value:.3f}" for value in (found.distinct, found.similarity))
        lines.append(
            f"{when}: {distinct} of the runs of {WORDS} words are different, and {alike} is the mean similarity to the "
            f"nearest other prompt (of {found.texts:,} prompts)"
        )
    return [*lines, f"{report.prompts:,} prompts, {report.seeds:,} of them the recipe's own → {path}"]


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("filters.evolve", "The teacher writes more prompts, and harder ones, from the recipe's own.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"each asks about every prompt (default: {ROUNDS})")
    parser.add_argument("--most", type=int, help="prompts in all, the recipe's own among them (default: no limit)")
    parser.add_argument("--near", type=float, default=NEAR, help=f"the similarity that is too much (default: {NEAR})")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    recipe, run, options = parse_stage(parser, argv)
    if not 0.5 <= options.near <= 1:
        raise UsageError(f"--near must be from 0.5 to 1, got {options.near:g}")
    with run.locked(new=True):
        report = evolve(recipe, run, rounds=options.rounds, most=options.most, near=options.near, quiet=options.quiet)
    for line in describe(report, run.path / "evolved.jsonl"):
        print(line)
    if failed := sum(one.failed for one in report.rounds):
        raise RequestsFailed(f"{failed} requests failed for good; run the same command again, and they are made again")


if __name__ == "__main__":
    run_stage(main)
