"""`python -m benchmarks.chapter_filter`: the flagship's first five rules against the reference loop.

The reference is the function that these rules come from (docs/filters.md), in a plain loop over texts in memory.

Agreement: both decide on real answers (`--answers`, journals of runs), made-up stories, and mutations of them around
every threshold, in NFC.

Speed: our whole stage, JSONL in and kept and dropped rows with all their reasons, report and lineage out, against the
reference loop. Both sides in one call, in turn; medians. The workload is the source's: its prompt (four characters,
two of six keywords), stories of 200 to 400 characters, some up to 600, and 70% that pass. Of the others a third is too
long, the rest too short, in another language, repeats the prompt, has a banned word, or loops; a third of all has
paragraphs, which JSON escapes. The file was just written, so it is in the page cache; our side goes once before it
counts, and the loop runs in a process of its own. `--folder` says on which file system all that happens. Then the same
with the flagship's prompts, and with all rules of the package.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unicodedata import normalize

from benchmarks.stories import Writer
from benchmarks.table import show
from filters.answer import as_answer, nfc
from filters.ruleset import load_rules
from filters.run import filter_run
from pipeline.recipe import FiltersConfig, Recipe, load_recipe
from pipeline.records import Completion, Message, Slots, Usage, encode_line, read_jsonl
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
    {"rule": "finish_reason"},
    {"rule": "foreign_script"},
    {"rule": "ending"},
    {"rule": "repetition"},
    {"rule": "meta_talk"},
    {"rule": "adherence", "slots": ["keywords"], "max_missing": 2},
]
PROMPT = "3~5세 어린이용 한국어 동화 한 편. 등장: 토끼 토토. 키워드: 달, 비. 200~400자."
TEMPLATE = "3~5세 어린이용 한국어 동화 한 편. 등장: {character}. 키워드: {keywords}. 200~400자."
CHARACTERS = ["토끼 토토", "곰 두두", "할머니", "고양이 미미"]
KEYWORDS = ["당근", "비", "달", "친구", "엄마", "꽃"]


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=Path, nargs="*", default=[], help="completions.jsonl of real runs")
    parser.add_argument("--texts", type=int, default=60_000)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files of the speed test are; default: a temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)  # the reference loop's own process: the rows
    options = parser.parse_args()
    if options.loop:
        print(*reference_loop(options.loop))
        return
    for said in speed(options.rows, options.runs, options.seed, options.folder):
        print(f"{said}\n", flush=True)
    real = [(row.text, row.messages[-1].content) for path in options.answers for row in read_jsonl(path, Completion)]
    made = [(story.text, PROMPT) for story in Writer(options.seed).stories(2000, 0.0)]
    rows = [
        completion(number, text, prompt)
        for number, (text, prompt) in enumerate(mutations([*real, *made], options.texts, options.seed))
    ]
    print(agreement(rows, len(real)))


def mutations(sources: list[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """The sources as they are, then with one to three changes each."""
    rng = random.Random(seed)
    yield from sources
    for _ in range(count - len(sources)):
        text, prompt = rng.choice(sources)
        for change in rng.choices(CHANGES, k=rng.randint(1, 3)):
            text = change(text, prompt, rng)
        yield text, prompt


def _resize(text: str, prompt: str, rng: random.Random) -> str:
    size = rng.choice([0, 1, 149, 150, 151, 599, 600, 601, rng.randint(0, 900)])
    return (text * (size // max(len(text), 1) + 1))[:size] if text else text


def _insert(text: str, what: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + what + text[at:]


def _same(text: str, prompt: str, rng: random.Random) -> str:
    for _ in range(rng.choice([4, 5, 6, 7])):
        text = _insert(text, "같은", rng)
    return text


def _other_script(text: str, prompt: str, rng: random.Random) -> str:
    share = rng.choice([0.3, 0.5, rng.random()])
    return "".join(rng.choice("abcé ㄱ漢あ🐰힣가ힿ") if rng.random() < share else char for char in text)


def _half(text: str, prompt: str, rng: random.Random) -> str:
    """Exactly half of the characters, or one less or more, are syllables."""
    half = rng.randint(75, 300)
    chars = ["가"] * (half + rng.choice([-1, 0, 1])) + ["."] * half
    rng.shuffle(chars)
    return "".join(chars)


CHANGES: list[Callable[[str, str, random.Random], str]] = [
    _resize,
    _same,
    _other_script,
    _half,
    lambda text, prompt, rng: _insert(text, rng.choice([*BANNED, "ai", "Model", "로 봇", "AI는"]), rng),
    lambda text, prompt, rng: _insert(text, prompt[: rng.choice([19, 20, 21])], rng),
    lambda text, prompt, rng: normalize("NFD", text),
    lambda text, prompt, rng: text.replace(" ", rng.choice(["", "\n", "\t", "\u3000"])),
]


def completion(number: int, text: str, prompt: str, slots: Slots | None = None) -> Completion:
    return Completion(
        id=f"{number:016x}",
        prompt_id=f"{number:016x}",
        messages=[Message("user", prompt)],
        slots=slots or {"character": "토끼 토토", "keywords": ["달", "비"]},
        endpoint="http://127.0.0.1:8000/v1",
        sampling={"temperature": 0.8, "top_p": 0.9, "max_tokens": 500, "seed": number},
        text=text,
        finish_reason="stop",
        model="teacher",
        usage=Usage(prompt_tokens=60, completion_tokens=200),
        latency_s=1.0,
        attempts=1,
        created="2026-01-01T00:00:00.000+00:00",
    )


def agreement(rows: list[Completion], real: int) -> str:
    """How many are decided alike."""
    rules = load_rules(FiltersConfig.model_validate({"rules": RULES}), Path("recipe.yaml"))
    kept, unlike = 0, []
    for row in rows:
        theirs = chapter_reason(nfc(row.messages[-1].content), nfc(row.text))
        ours = next((reason.rule for reason in rules.reasons(as_answer(row))), None)
        kept += theirs is None
        if theirs != ours:
            unlike.append(row)
    for row in unlike[:3]:
        print(f"unlike: {row.text[:200]!r}", file=sys.stderr)
    what = f"{len(rows):,} texts ({real} real answers), {kept:,} kept by the reference"
    return f"{what}: {len(unlike)} decided otherwise"


def workload(count: int, seed: int, template: str, slots: dict[str, list[str]]) -> Iterator[Completion]:
    """Rows as the module's docstring says; `slots` are what may fill the template."""
    rng = random.Random(seed)
    stories = [story.text for story in Writer(seed).stories(5000, 0.0) if 200 <= len(story.text) <= 400]
    for number, fault in enumerate(rng.choices([None, *FAULTS], weights=[70, 10, 5, 5, 4, 4, 2], k=count)):
        filled: Slots = {name: rng.choice(values) for name, values in slots.items()}
        filled["keywords"] = keywords = rng.sample(slots["keywords"], 2)
        prompt = template.format(**{**filled, "keywords": ", ".join(keywords)})
        text = rng.choice(stories)
        if rng.random() < 0.15:  # up to 600
            text = f"{text} {rng.choice(stories)}"[: rng.randint(400, 600)]
        if rng.random() < 0.33:
            text = text.replace(". ", ".\n\n", 3)
        yield completion(number, fault(text, prompt, rng) if fault else text, prompt, filled)


FAULTS: list[Callable[[str, str, random.Random], str]] = [
    lambda text, prompt, rng: (text * 4)[: rng.randint(601, 800)],  # 500 tokens of Korean
    lambda text, prompt, rng: text[: rng.randint(40, 149)],
    lambda text, prompt, rng: (
        "Once upon a time there was a rabbit who lived by the river with his mother. " * rng.randint(3, 6)
    ),
    lambda text, prompt, rng: f"{prompt}\n\n{text[:400]}",
    lambda text, prompt, rng: _insert(text[:500], f"{rng.choice(BANNED)} ", rng),
    lambda text, prompt, rng: text[:300] + "같은 " * rng.randint(6, 20),
]


def speed(count: int, runs: int, seed: int, folder: Path | None) -> Iterator[str]:
    """The stage against the reference loop."""
    prompts = load_recipe(Path(__file__).parents[1] / "recipes" / "korean_stories.yaml").prompts
    flagship = {name: values if isinstance(values, list) else values.from_ for name, values in prompts.slots.items()}
    source = {"character": CHARACTERS, "keywords": KEYWORDS}
    for name, template, slots, rules in (
        ("the five rules, the source's prompt", TEMPLATE, source, RULES),
        ("the five rules, the flagship's prompts", str(prompts.template), flagship, RULES),
        ("all rules, the flagship's prompts", str(prompts.template), flagship, [*RULES, *FURTHER_RULES]),
    ):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            yield f"{name}:\n{_race(Path(place), workload(count, seed, template, slots), rules, runs)}"


def recipe_of(rules: list[dict[str, Any]]) -> Recipe:
    return Recipe(
        name="chapter",
        teacher={"model": "teacher"},
        prompts={"template": TEMPLATE, "count": 1, "slots": {"character": CHARACTERS, "keywords": KEYWORDS}},
        filters={"rules": rules},
    )


def _race(place: Path, rows: Iterable[Completion], rules: list[dict[str, Any]], runs: int) -> str:
    recipe, run = recipe_of(rules), RunDir(place)
    with run.completions.open("wb") as file:
        file.writelines(map(encode_line, rows))
    command = [sys.executable, "-m", "benchmarks.chapter_filter", "--loop", str(run.completions)]
    loop, ours = list[float](), list[float]()
    for number in range(-1, runs):
        for old in (run.kept, run.dropped):
            old.unlink(missing_ok=True)
        started = time.perf_counter()
        report = filter_run(recipe, run, Path("recipe.yaml"))
        seconds = time.perf_counter() - started
        if number >= 0:
            ours.append(seconds)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            loop.append(float(done.stdout.split()[0]))
    table = [
        ("side", "rows/s"),
        ("the reference loop, in memory", f"{report.rows / median(loop):,.0f}"),
        ("filters, JSONL to JSONL", f"{report.rows / median(ours):,.0f}"),
    ]
    size = run.completions.stat().st_size >> 20
    rate = f"{report.rows:,} rows, {size} MiB, {report.keep_rate:.0%} kept"
    return f"{show(table)}\n{rate}: {median(loop) / median(ours):.2f} times the loop's speed"


def reference_loop(completions: Path) -> tuple[float, int]:
    """The seconds of one loop over all texts, the second time, and how many it keeps."""
    texts = [(row.text, row.messages[-1].content) for row in read_jsonl(completions, Completion)]
    for _ in range(2):
        started = time.perf_counter()
        kept = [text for text, prompt in texts if not chapter_reason(prompt, text)]
        seconds = time.perf_counter() - started
    return seconds, len(kept)


if __name__ == "__main__":
    main()
