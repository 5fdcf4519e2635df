"""`python -m benchmarks.chapter_filter`: the flagship's five chapter rules against the chapter's own function.

Agreement: both decide on real answers (`--answers`, journals of runs), made-up stories, and mutations of them around
every threshold, in NFC. Speed: our whole stage, JSONL in and kept and dropped rows with all their reasons out, against
the function in a plain loop over texts that are in memory already. Both sides in one call; medians.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unicodedata import normalize

from benchmarks.stories import Writer
from benchmarks.table import show
from filters.answer import as_answer, nfc
from filters.ruleset import load_rules
from filters.run import filter_run
from pipeline.recipe import FiltersConfig, Recipe
from pipeline.records import Completion, Message, Usage, encode_line, read_jsonl
from pipeline.rundir import RunDir

BANNED = ("AI", "GPT", "model", "로봇", "인공지능")
RULES: list[dict[str, Any]] = [
    {"rule": "length", "min_chars": 150, "max_chars": 600},
    {"rule": "banned_words", "words": list(BANNED)},
    {"rule": "repeated_word", "word": "같은", "max_count": 5},
    {"rule": "prompt_echo", "chars": 20},
    {"rule": "script_ratio", "script": "hangul", "min_share": 0.5},
]
PROMPT = "3~5세 어린이용 한국어 동화 한 편. 등장: 토끼 토토. 키워드: 달, 비. 200~400자."


def chapter_reason(instruction: str, output: str) -> str | None:
    """The chapter's decision: the first of its rules that drops an answer, by our name; None where it is kept."""
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
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    real = [(row.text, row.messages[-1].content) for path in options.answers for row in read_jsonl(path, Completion)]
    made = [(story.text, PROMPT) for story in Writer(options.seed).stories(2000, 0.0)]
    rows = [
        completion(number, text, prompt)
        for number, (text, prompt) in enumerate(mutations([*real, *made], options.texts, options.seed))
    ]
    print(agreement(rows, len(real)))
    print(speed(rows, options.runs))


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


def completion(number: int, text: str, prompt: str) -> Completion:
    return Completion(
        id=f"{number:016x}",
        prompt_id=f"{number:016x}",
        messages=[Message("user", prompt)],
        slots={"character": "토끼 토토", "keywords": ["달", "비"]},
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
        kept += theirs is None
        if theirs != next(iter(rules.reasons(as_answer(row))), None):
            unlike.append(row)
    for row in unlike[:3]:
        print(f"unlike: {row.text[:200]!r}", file=sys.stderr)
    what = f"{len(rows):,} texts ({real} real answers), {kept:,} kept by the chapter's function"
    return f"{what}: {len(unlike)} decided otherwise"


def speed(rows: list[Completion], runs: int) -> str:
    """The stage against the loop."""
    texts = [(row.text, row.messages[-1].content) for row in rows]
    recipe = Recipe(
        _cli_parse_args=[],
        name="chapter",
        teacher={"model": "teacher"},
        prompts={"template": "Hi", "count": 1},
        filters={"rules": RULES},
    )
    seconds: dict[str, list[float]] = {"the chapter's loop, in memory": [], "filters, JSONL to JSONL": []}
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.completions.write_bytes(b"".join(map(encode_line, rows)))
        size = run.completions.stat().st_size
        for _ in range(runs):
            started = time.perf_counter()
            kept = [text for text, prompt in texts if not chapter_reason(prompt, text)]
            seconds["the chapter's loop, in memory"].append(time.perf_counter() - started)
            started = time.perf_counter()
            report = filter_run(recipe, run, Path("recipe.yaml"))
            seconds["filters, JSONL to JSONL"].append(time.perf_counter() - started)
            assert kept and report.rows == len(rows)
    loop, ours = (median(values) for values in seconds.values())
    table = [("side", "rows/s")] + [(name, f"{len(rows) / median(values):,.0f}") for name, values in seconds.items()]
    return f"{show(table)}\n{len(rows):,} rows, {size >> 20} MiB: {loop / ours:.2f} times the loop's speed"


if __name__ == "__main__":
    main()
