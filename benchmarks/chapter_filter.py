"""`python -m benchmarks.chapter_filter`: the flagship's first five rules against the reference rules.

The reference is the function that these rules come from (docs/filters.md), in a plain loop over texts in memory.

Speed (`--rows`): the whole stage, JSONL in and kept and dropped rows, report and lineage out, against the reference
loop, in turn; medians. The rows are as the source describes them (see `workload`); then the same with the flagship's
prompts, and with all rules of the package but `language`.

Agreement: both decide on made-up stories and on real answers (`--answers`, the completions.jsonl of runs), in NFC.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import flags, measured
from benchmarks.stories import PROMPT, PROMPT_SLOTS, TEMPLATE, Writer, completion, recipe_of
from filters.answer import as_answer, nfc
from filters.ruleset import load_rules
from filters.run import filter_run
from pipeline.cli import run_stage
from pipeline.filters_config import FiltersConfig
from pipeline.recipe import load_recipe
from pipeline.records import Completion, Slots, encode_line, read_jsonl
from pipeline.rundir import RunDir

BANNED = ("AI", "GPT", "model", "로봇", "인공지능")
RULES: list[dict[str, Any]] = [
    {"rule": "length", "min_chars": 150, "max_chars": 600},
    {"rule": "banned_words", "words": list(BANNED)},
    {"rule": "repeated_word", "word": "같은", "max_count": 5},
    {"rule": "prompt_echo", "chars": 20},
    {"rule": "script_ratio", "script": "hangul", "min_share": 0.5},
]
FURTHER_RULES: list[dict[str, Any]] = [
    *({"rule": name} for name in ("finish_reason", "foreign_script", "ending", "repetition", "meta_talk")),
    {"rule": "adherence", "slots": ["keywords"], "max_missing": 2},
]
FLAGSHIP = Path(__file__).parents[1] / "recipes" / "korean_stories.yaml"


def chapter_reason(instruction: str, output: str) -> str | None:
    """The reference function's decision: the first of its rules that drops an answer, by our name, or None."""
    if len(output) < 150 or len(output) > 600:
        return "length"
    if any(word in output for word in BANNED):
        return "banned_words"
    if output.count("같은") > 5:
        return "repeated_word"
    if instruction[:20] in output:
        return "prompt_echo"
    if sum("가" <= char <= "힣" for char in output) / len(output) < 0.5:
        return "script_ratio"
    return None


def main() -> None:
    options = flags(__doc__, answers=[], rows=300_000, runs=3, seed=0)
    prompts = load_recipe(FLAGSHIP).prompts
    slots = {name: values if isinstance(values, list) else values.from_ for name, values in prompts.slots.items()}
    for name, template, filling, rules in (
        ("the five rules, the source's prompt", TEMPLATE, PROMPT_SLOTS, RULES),
        ("the five rules, the flagship's prompts", str(prompts.template), slots, RULES),
        ("all rules, the flagship's prompts", str(prompts.template), slots, [*RULES, *FURTHER_RULES]),
    ):
        rows = workload(options.rows, options.seed, template, filling)
        print(f"{name}: {race(rows, rules, options.runs)}", flush=True)
    real = [(row.text, row.messages[-1].content) for path in options.answers for row in read_jsonl(path, Completion)]
    made = [(story.text, PROMPT) for story in Writer(options.seed).stories(2000, 0.0)]
    print(agreement([*real, *made], len(real)))


def race(rows: Iterable[Completion], rules: list[dict[str, Any]], runs: int) -> str:
    """The stage against the reference loop, in a process of its own. The first round of both does not count."""
    recipe = recipe_of({"rules": rules})
    loop, ours = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        with run.completions.open("wb") as file:
            file.writelines(map(encode_line, rows))
        for _ in range(runs + 1):
            for old in (run.kept, run.dropped):
                old.unlink(missing_ok=True)
            started = time.perf_counter()
            report = filter_run(recipe, run, Path("recipe.yaml"))
            ours.append(time.perf_counter() - started)
            loop.append(measured(reference_loop, run.completions).value)
        size = run.completions.stat().st_size >> 20
    loop_rate, rate = (report.rows / median(seconds[1:]) for seconds in (loop, ours))
    return (
        f"{report.rows:,} rows, {size} MiB, {report.keep_rate:.0%} kept: the reference loop, in memory "
        f"{loop_rate:,.0f} rows/s; filters, JSONL to JSONL {rate:,.0f} rows/s: {rate / loop_rate:.2f} times"
    )


def reference_loop(completions: Path) -> float:
    """The seconds of one loop over all texts; the second one, since the first is slower."""
    texts = [(row.text, row.messages[-1].content) for row in read_jsonl(completions, Completion)]
    for _ in range(2):
        started = time.perf_counter()
        kept = [text for text, prompt in texts if not chapter_reason(prompt, text)]
        seconds = time.perf_counter() - started
    assert kept
    return seconds


def agreement(texts: Iterable[tuple[str, str]], real: int) -> str:
    """How many texts, each with its prompt, are decided alike."""
    rules = load_rules(FiltersConfig.model_validate({"rules": RULES}), Path("recipe.yaml"))
    decided = list[tuple[str | None, str | None]]()
    for text, prompt in texts:
        reasons = rules.reasons(as_answer(completion(0, text, prompt)))
        decided.append((chapter_reason(nfc(prompt), nfc(text)), reasons[0].rule if reasons else None))
    kept = sum(reference is None for reference, _ in decided)
    unlike = sum(reference != ours for reference, ours in decided)
    return f"{len(decided):,} texts ({real} real answers), {kept:,} kept by the reference: {unlike} decided otherwise"


def workload(count: int, seed: int, template: str, slots: dict[str, list[str]]) -> Iterator[Completion]:
    """Stories of 200 to 400 characters, some up to 600, a third of them in paragraphs; 70% pass, FAULTS has the rest.

    `slots` are what may fill the template; two keywords each.
    """
    rng = random.Random(seed)
    stories = [story.text for story in Writer(seed).stories(5000, 0.0) if 200 <= len(story.text) <= 400]
    for number, fault in enumerate(rng.choices([None, *FAULTS], weights=[70, 10, 5, 5, 4, 4, 2], k=count)):
        filled: Slots = {name: rng.choice(values) for name, values in slots.items()}
        filled["keywords"] = keywords = rng.sample(slots["keywords"], 2)
        prompt = template.format(**{**filled, "keywords": ", ".join(keywords)})
        text = rng.choice(stories)
        if rng.random() < 0.15:
            text = f"{text} {rng.choice(stories)}"[: rng.randint(400, 600)]
        if rng.random() < 0.33:
            text = text.replace(". ", ".\n\n", 3)  # which JSON escapes
        yield completion(number, fault(text, prompt, rng) if fault else text, prompt, filled)


Change = Callable[[str, str, random.Random], str]  # of a text; the second argument is its prompt


def insert(text: str, what: str, rng: random.Random, times: int = 1) -> str:
    """The text with something in it, at random places."""
    for _ in range(times):
        at = rng.randint(0, len(text))
        text = text[:at] + what + text[at:]
    return text


FAULTS: list[Change] = [  # of the workload
    lambda text, prompt, rng: (text * 4)[: rng.randint(601, 800)],  # 500 tokens of Korean
    lambda text, prompt, rng: text[: rng.randint(40, 149)],
    lambda text, prompt, rng: "Once upon a time a rabbit lived by the river with his mother. " * rng.randint(3, 6),
    lambda text, prompt, rng: f"{prompt}\n\n{text[:400]}",
    lambda text, prompt, rng: insert(text[:500], f"{rng.choice(BANNED)} ", rng),
    lambda text, prompt, rng: text[:300] + "같은 " * rng.randint(6, 20),
]

if __name__ == "__main__":
    run_stage(main)
