"""Each recipe at a tiny size, without a model: its first prompts, what the teacher is told, and which answers stay."""

import json
from itertools import islice
from pathlib import Path

import pytest
from msgspec.structs import asdict

from filters.run import filter_run
from generate.jobs import Job, build_jobs
from generate.prompts import iter_prompts
from pipeline.instructions import asked_of_student
from pipeline.reasoning import split_reasoning
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Completion, Dropped, Kept, Prompt, encode_line, read_jsonl
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields

RECIPES = Path(__file__).parents[2] / "recipes"

# A right answer to the first prompt, made from its reference, and for each wrong or hostile one the rule that drops it.
LABELS = '{"category": "technical", "priority": "high", "product": "toaster"}'
ANSWERS = {
    "demo": ("{json}", {'{{"room": "moon", "device": "lamp", "state": "on"}}': "matches", "[" * 20_000: "json_schema"}),
    "tickets": (
        "```json\n{json}\n```",
        {LABELS.replace("{", "{{").replace("}", "}}"): "json_schema", "none": "json_schema"},
    ),
    "math_reasoning": (
        "<think>\nFirst 3 * 8, then the rest.\n</think>\nIt is \\boxed{{{text}}}.",
        {
            "<think>\nFirst 3 * 8, then the rest.\n</think>\nIt is \\boxed{{-1}}.": "math",
            "<think>\nFirst 3 * 8, then the rest.\n</think>\n\\boxed{{9**9**9**9}}": "math",
            "It is \\boxed{{{text}}}.": "length#reasoning",
        },
    ),
    "python_functions": (
        "```python\ndef add(a, b):\n    return a + b\n```",
        {
            "```python\ndef add(a, b):\n    return a - b\n```": "python",
            "```python\nimport os\nos._exit(0)\n```": "python",
            "```python\nprint(open('/etc/passwd').read())\n```": "python",
        },
    ),
    "assistant_turns": (
        "Then use vinegar: half a cup in a full kettle. Does the crust go all the way up?",
        {
            "As an AI language model, I cannot own a kettle, and so I cannot help you with that.": "meta_talk",
            "Yes.": "length",
        },
    ),
    "text_to_sql": (
        "{text}",
        {
            "SELECT name FROM nothing": "sql",
            "DROP TABLE customers": "sql",
            "ATTACH 'x.sqlite' AS x": "sql",
            "SELECT name FROM customers WHERE city = 'Atlantis'": "sql",
        },
    ),
}


def load(name: str) -> tuple[Recipe, list[Prompt], list[Job]]:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    prompts = list(islice(iter_prompts(recipe), 3))
    return recipe, prompts, list(build_jobs(prompts, recipe))


def filtered(recipe: Recipe, folder: Path, answers: list[Completion]) -> tuple[list[str], dict[str, str]]:
    """The texts that stay, and the rule that dropped each other."""
    run = RunDir(folder)
    run.path.mkdir(exist_ok=True)
    run.completions.write_bytes(b"".join(map(encode_line, answers)))
    filter_run(recipe, run, RECIPES / f"{recipe.name}.yaml")
    kept = [row.text for row in read_jsonl(run.kept, Kept)]
    return kept, {row.text: row.rule for row in read_jsonl(run.dropped, Dropped)}


def answer(job: Job, text: str) -> Completion:
    reasoning, rest = split_reasoning(text)
    return Completion(**completion_fields(job.request.id, rest, **asdict(job.request), reasoning=reasoning))


def test_each_recipe_is_tried_here() -> None:
    verified = {path.stem for path in RECIPES.glob("*.yaml")} - {"korean_stories", "stories_demo"}
    assert verified == set(ANSWERS)


@pytest.mark.parametrize("name", ANSWERS)
def test_the_teacher_is_told_more_than_the_student(name: str) -> None:
    recipe, prompts, jobs = load(name)
    assert len(jobs) == 3 * recipe.prompts.samples > 3
    assert len({job.request.id for job in jobs}) == len(jobs)
    asked = {prompt.messages[-1].content for prompt in islice(iter_prompts(recipe), recipe.prompts.count)}
    assert not asked & {example.prompt for example in recipe.teacher.examples}  # the teacher would know the answer
    for job in jobs:
        told = job.told
        assert told[0].role == "system" and told[0].content == recipe.teacher.system
        assert len(told) == 1 + 2 * len(recipe.teacher.examples) + len(job.request.messages)
        assert asked_of_student(job.request.messages, recipe.student) == job.request.messages
    assert [prompt.messages for prompt in prompts] == [job.request.messages for job in jobs[:: recipe.prompts.samples]]


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answers_stay_and_others_go_with_their_reason(name: str, tmp_path: Path) -> None:
    recipe, prompts, jobs = load(name)
    right, wrong = ANSWERS[name]
    reference = prompts[0].reference
    text = reference if isinstance(reference, str) else json.dumps(reference)
    as_json = text if text.startswith("{") else json.dumps(reference)
    texts = [one.format(text=text, json=as_json) if "{" in one else one for one in (right, *wrong)]
    for number, one in enumerate(texts):  # each alone: a prompt's samples are compared with each other
        row = answer(jobs[0], one)
        kept, dropped = filtered(recipe, tmp_path / str(number), [row])
        assert (kept, dropped) == (
            ([row.text], {}) if number == 0 else ([], {row.text: list(wrong.values())[number - 1]})
        )


def test_sql_is_kept_by_what_most_samples_find(tmp_path: Path) -> None:
    recipe, prompts, jobs = load("text_to_sql")
    gold = prompts[0].reference
    texts = [gold, f"{gold};", "SELECT name FROM products", "SELECT 1 FROM nothing"]
    kept, dropped = filtered(recipe, tmp_path, [answer(job, text) for job, text in zip(jobs, texts, strict=False)])
    assert kept == [gold]
    assert dropped == {texts[1]: "select", texts[2]: "agrees", texts[3]: "sql"}
