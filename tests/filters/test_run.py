"""`python -m filters` from end to end: what it writes, what it refuses, and what an interrupted run leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import filters.run
import filters.stream
from filters.__main__ import main
from filters.report import FilterReport, PromptCounts, RuleCount, SlotCount, print_report
from filters.rows import staged
from filters.tally import Example
from pipeline.errors import DataError, DistillError, RecipeError
from pipeline.records import Completion, Dropped, Kept, Message, Reason, Slots, Usage, encode_line, read_jsonl
from pipeline.rundir import RunDir

ROOT = Path(__file__).parents[2]
RULES: list[dict[str, Any]] = [
    {"rule": "length", "min_chars": 10},
    {"rule": "banned_words", "words": ["AI"]},
    {"rule": "finish_reason"},
]
OUTPUTS = ("kept.jsonl", "dropped.jsonl", "filter_report.json")
ONE_PROMPT = PromptCounts(1, 0, 0.0, 1, {}, 1, [])


def completion(number: int, text: str, *, finish_reason: str = "stop", **slots: str | list[str]) -> Completion:
    filled: Slots = dict(slots)
    return Completion(
        id=f"id{number:04}",
        prompt_id=f"p{number}",
        messages=[Message("user", "토끼 이야기를 써 주세요.")],
        slots=filled,
        endpoint="http://127.0.0.1:8000/v1",
        sampling={"seed": number, "temperature": 0.8},
        text=text,
        finish_reason=finish_reason,
        model="teacher",
        usage=Usage(prompt_tokens=3),
        latency_s=0.25,
        attempts=1,
        created="2026-01-01T00:00:00Z",
    )


ROWS = [
    completion(0, "토끼 토토가 당근을 먹었어요.", hero="토토", things=["당근", "비"]),
    completion(1, "AI 토끼", hero="토토", things=["당근", "달"]),  # too short, and banned
    completion(2, "토끼가 AI를 만났어요. 끝.", hero="두두", things=["비", "달"]),
    completion(3, "짧아요", finish_reason="length", hero="두두", things=["비", "달"]),
    completion(4, "곰 두두가 잠이 들었어요.\n끝.", hero="두두", things=["비", "당근"]),
]
GOOD = b"".join(map(encode_line, ROWS))


class Stage:
    """A recipe and its run in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.recipe, self.run = folder / "recipe.yaml", RunDir(folder / "run")
        self.rules(RULES)

    def rules(self, rules: list[dict[str, Any]], **settings: Any) -> None:
        data = {
            "name": "small",
            "teacher": {"model": "teacher"},
            "prompts": {"count": 5, "template": "{hero}", "slots": {"hero": ["토토", "두두"], "things": ["비"]}},
            "filters": {"rules": rules, **settings},
        }
        self.recipe.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")

    def completions(self, content: bytes = GOOD) -> None:
        self.run.path.mkdir(exist_ok=True)
        self.run.completions.write_bytes(content)

    def filter(self, *flags: str) -> None:
        main([str(self.recipe), "--run", str(self.run.path), *flags])

    def command(self, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "filters", str(self.recipe), "--run", str(self.run.path), *flags]
        wide = os.environ | {"COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=wide, check=False)

    def outputs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.run.path.iterdir() if path.name in OUTPUTS}

    def files(self) -> dict[str, bytes]:
        """All the run's files, temporary ones too."""
        return {path.name: path.read_bytes() for path in self.run.path.iterdir() if path.name != ".lock"}

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.run.filter_report.read_bytes())
        return report


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_every_answer_is_kept_or_dropped_with_all_reasons(stage: Stage) -> None:
    stage.completions()
    done = stage.command()
    assert done.returncode == 0, done.stderr
    assert "5 answers in, 2 kept, 3 dropped: keep rate 40.0%" in done.stdout
    assert "warning: keep rate 40.0% is under 50% (filters.warn_keep_rate); length drops most, 2 answers" in done.stderr
    kept, dropped = list(read_jsonl(stage.run.kept, Kept)), list(read_jsonl(stage.run.dropped, Dropped))
    assert [row.id for row in kept] == ["id0000", "id0004"]
    assert [row.id for row in dropped] == ["id0001", "id0002", "id0003"]
    assert [row.rule for row in dropped] == ["length", "banned_words", "length"]
    too_short, banned = Reason(rule="length", value=5, at_least=10), Reason(rule="banned_words", found="AI")
    cut = Reason(rule="finish_reason", found="length", allowed=["stop"])
    shorter = Reason(rule="length", value=3, at_least=10)
    assert [row.detail for row in dropped] == [[too_short, banned], [banned], [shorter, cut]]
    assert json.loads(stage.run.dropped.read_bytes().splitlines()[1])["detail"] == [
        {"rule": "banned_words", "found": "AI"}
    ]


def test_the_records_fields_stay_as_they_were(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    before = {row.id: row for row in ROWS}
    rows = [*read_jsonl(stage.run.kept, Kept), *read_jsonl(stage.run.dropped, Dropped)]
    for row in rows:
        assert {name: getattr(row, name) for name in Completion.__struct_fields__} == {
            name: getattr(before[row.id], name) for name in Completion.__struct_fields__
        }
    assert len(rows) == len(ROWS)
    assert all(row.scores == {} for row in rows if isinstance(row, Kept))


def test_the_reports_figures(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    report = stage.report()
    assert (report["rows"], report["kept"], report["dropped"], report["keep_rate"]) == (5, 2, 3, 0.4)
    counts = {rule["rule"]: (rule["dropped"], rule["alone"], rule["together"]) for rule in report["rules"]}
    assert counts == {"length": (2, 0, 2), "banned_words": (1, 1, 1), "finish_reason": (0, 0, 1)}
    assert report["rules"][0]["settings"] == {"min_chars": 10, "max_chars": None}
    assert [example["id"] for example in report["rules"][1]["examples"]] == ["id0001", "id0002"]
    assert report["rules"][1]["examples"][0] == {"id": "id0001", "reason": "contains `AI`", "text": "AI 토끼"}
    assert report["overlaps"] == {"length + banned_words": 1, "length + finish_reason": 1}
    assert report["slots"]["hero"] == {
        "두두": {"rows": 3, "kept": 1, "keep_rate": pytest.approx(1 / 3)},
        "토토": {"rows": 2, "kept": 1, "keep_rate": 0.5},
    }
    assert {value: (c["rows"], c["kept"]) for value, c in report["slots"]["things"].items()} == {
        "달": (3, 0), "비": (4, 2), "당근": (3, 2),
    }  # fmt: skip
    assert report["lengths"] == {"0-49": {"kept": 2, "dropped": 3}}
    lineage = json.loads(stage.run.lineage.read_bytes())["filters"]
    assert (lineage["rows"], lineage["kept"], lineage["dropped_by_rule"]["length"]) == (5, 2, 2)


def test_again_gives_the_same_and_new_rules_replace_the_old_outcome(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    first = stage.outputs()
    stage.filter()
    assert stage.outputs() == first
    stage.rules([{"rule": "length", "min_chars": 1}])
    stage.filter()
    assert len(list(read_jsonl(stage.run.kept, Kept))) == 5 and stage.run.dropped.read_bytes() == b""


def test_without_rules_all_are_kept_with_a_warning(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.rules([])
    stage.completions()
    stage.filter()
    assert "warning: filters.rules is empty: every answer is kept" in capsys.readouterr().err
    assert stage.report()["kept"] == 5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "lenght"}, "recipe.yaml: filters.rules[1]: no rule named `lenght`; there are length,"),
        ({"rule": "length", "min_char": 5}, "recipe.yaml: filters.rules[1].min_char: the rule `length` has no such"),
        ({"rule": "adherence", "slots": ["villain"]}, "recipe.yaml: filters.rules[1].slots: the prompts have no slot"),
    ],
)
def test_a_wrong_rule_ends_with_2_before_anything_is_written(stage: Stage, rule: dict[str, Any], message: str) -> None:
    stage.rules([RULES[0], rule])
    stage.completions()
    done = stage.command()
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert stage.outputs() == {}


def test_the_keep_rates_floor(stage: Stage) -> None:
    stage.rules(RULES, min_keep_rate=0.41)
    stage.completions()
    done = stage.command()
    assert done.returncode == 1
    assert "keep rate 40.0% is under filters.min_keep_rate 41%" in done.stderr and "--allow-low-keep" in done.stderr
    assert "5 answers in, 2 kept" in done.stdout  # the table is there to find out why
    assert stage.report()["kept"] == 2
    allowed = stage.command("--allow-low-keep")
    assert allowed.returncode == 0 and "warning: keep rate 40.0% is under 50%" in allowed.stderr
    stage.rules(RULES, min_keep_rate=0.4, warn_keep_rate=0.4)
    at_the_floor = stage.command()
    assert (at_the_floor.returncode, at_the_floor.stderr) == (0, "")


@pytest.mark.parametrize("block", [1, 7, 600, 1_000])
@pytest.mark.parametrize("parallel_from", [0, 1 << 40])
def test_blocks_and_processes_change_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, block: int, parallel_from: int
) -> None:
    stage.completions(GOOD + b"\n" + GOOD)
    stage.filter()
    whole = stage.outputs()
    monkeypatch.setattr(filters.stream, "BLOCK", block)
    monkeypatch.setattr(filters.stream, "PARALLEL_FROM", parallel_from)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    stage.filter()
    assert stage.outputs() == whole
    stage.completions(GOOD + b"oops\n" + GOOD)
    with pytest.raises(DataError, match=r"completions\.jsonl:6: "):
        stage.filter()
    assert stage.outputs() == whole


def test_a_users_own_rule(stage: Stage) -> None:
    (stage.recipe.parent / "mine.py").write_text(
        "def no_bears(answer, word):\n    return f'has a {word}' if word in answer.text else None\n"
    )
    stage.rules([*RULES, {"rule": "function", "file": "mine.py", "name": "no_bears", "word": "곰"}])
    stage.completions()
    stage.filter()
    (row,) = [row for row in read_jsonl(stage.run.dropped, Dropped) if row.rule == "no_bears"]
    assert (row.id, row.detail) == ("id0004", [Reason(rule="no_bears", note="has a 곰")])
    settings = stage.report()["rules"][3]["settings"]
    assert settings == {"file": "mine.py", "name": "no_bears", "word": "곰"}


def test_what_a_users_rule_does_to_the_slots_is_its_own(stage: Stage) -> None:
    (stage.recipe.parent / "mine.py").write_text(
        "def wild(answer):\n    answer.slots.pop('hero')\n    answer.slots['things'].clear()\n"
    )
    stage.rules([{"rule": "function", "file": "mine.py", "name": "wild"}])
    stage.completions(GOOD + GOOD)
    stage.filter()
    slots = stage.report()["slots"]
    assert (slots["hero"]["토토"]["rows"], slots["things"]["비"]["rows"]) == (4, 8)


def test_a_disk_that_is_full_is_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.completions()
    stage.filter()
    old = stage.files()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DistillError, match="No space left on device; no old file was replaced"):
        stage.filter()
    assert stage.files() == old


def test_the_lineage_is_replaced_with_the_other_files_or_not_at_all(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has room for the answers but not for lineage.json leaves all files as they were."""
    stage.completions()
    stage.filter()
    old = stage.files()
    sync, full = os.fsync, OSError(errno.ENOSPC, "No space left on device")

    def sync_but_lineage(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "lineage.json.tmp":
            raise full
        sync(descriptor)

    monkeypatch.setattr("os.fsync", sync_but_lineage)
    stage.rules([])
    with pytest.raises(DistillError, match="No space left on device; no old file was replaced"):
        stage.filter()
    assert stage.files() == old


def test_what_takes_the_places_of_files_is_on_disk_before(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = dict[str, int](), os.fsync

    def noted(descriptor: int) -> None:
        synced[Path(f"/proc/self/fd/{descriptor}").readlink().name] = os.fstat(descriptor).st_size
        sync(descriptor)

    monkeypatch.setattr("os.fsync", noted)
    stage.completions()
    stage.filter()
    for path in (stage.run.kept, stage.run.dropped, stage.run.filter_report, stage.run.lineage):
        assert synced[f"{path.name}.tmp"] == path.stat().st_size > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_between_the_renames_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    paths = [tmp_path / "kept", tmp_path / "dropped"]
    for path in paths:
        path.write_bytes(b"old")
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), number)
        return rename(self, target)

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    before, ended = signal.signal(number, interrupt), threading.Event()
    threading.Thread(target=ended.wait).start()  # as those of numpy, it may get the signal
    try:
        with pytest.raises(KeyboardInterrupt), staged(paths) as files:
            for file in files:
                file.write(b"new")
    finally:
        signal.signal(number, before)
        ended.set()
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]


def test_a_file_that_cannot_be_replaced_says_that_others_were(tmp_path: Path) -> None:
    paths = [tmp_path / "kept", tmp_path / "dropped"]
    paths[1].mkdir()  # no file can take its place
    told = r"dropped.*; some old files may be replaced: run the filters again"
    with pytest.raises(DistillError, match=told), staged(paths) as files:
        files[0].write(b"new")
    assert paths[0].read_bytes() == b"new" and {*tmp_path.iterdir()} == {*paths}


@pytest.mark.parametrize("name", ["kept.jsonl", "dropped.jsonl"])
def test_a_damaged_output_says_what_to_do(stage: Stage, name: str) -> None:
    stage.completions()
    stage.filter()
    with (stage.run.path / name).open("ab") as file:
        file.write(b"\0" * 100)
    with pytest.raises(DataError, match=rf"{name}:\d: .*; run the filters again"):
        stage.filter("--dry-run")


def test_an_old_dropped_file_says_what_to_do(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    lines = [json.loads(line) for line in stage.run.dropped.read_bytes().splitlines()]
    old = [{**line, "detail": {"length": "3 characters, at least 10 wanted"}} for line in lines]
    stage.run.dropped.write_text("".join(json.dumps(line) + "\n" for line in old))
    with pytest.raises(DataError, match=r"dropped\.jsonl:1: Expected `array`.*run the filters again"):
        stage.filter("--dry-run")


@pytest.mark.parametrize(
    ("raised", "seen", "parallel_from"),
    [
        ("ValueError('full moon')", DistillError, 1 << 40),
        ("ValueError('full moon')", DistillError, 0),
        ("KeyboardInterrupt", KeyboardInterrupt, 1 << 40),
    ],
)
def test_stopped_in_the_middle_it_leaves_the_old_files(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, raised: str, seen: type[BaseException], parallel_from: int
) -> None:
    stage.completions()
    stage.filter()
    old = stage.files()
    (stage.recipe.parent / "mine.py").write_text(
        f"def stop(answer):\n    if '두두가' in answer.text:\n        raise {raised}\n"
    )
    stage.rules([{"rule": "function", "file": "mine.py", "name": "stop"}])
    monkeypatch.setattr(filters.stream, "BLOCK", 600)
    monkeypatch.setattr(filters.stream, "PARALLEL_FROM", parallel_from)
    with pytest.raises(seen) as error:
        stage.filter()
    if seen is DistillError:
        assert "mine.py: stop raised ValueError: full moon; the answer begins with '곰 두두가" in str(error.value)
    assert stage.files() == old


def test_a_lineage_that_cannot_be_read_is_told_before_anything_is_replaced(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    stage.run.lineage.write_text("{")
    stage.rules([])
    old = stage.files()
    with pytest.raises(DataError, match=r"lineage\.json"):
        stage.filter()
    assert stage.files() == old


def test_dry_run_shows_what_would_change_and_writes_nothing(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    old = stage.files()
    stage.rules([{"rule": "length", "min_chars": 4}, {"rule": "banned_words", "words": ["당근"]}])
    done = stage.command("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kept, would be dropped (1)" in done.stdout and "dropped, would be kept (2)" in done.stdout
    shown = " ".join(done.stdout.split())
    assert "id0000 now: banned_words" in shown and "contains `당근`" in shown
    assert "id0001 was: length" in shown and "id0004" not in shown
    assert "5 answers: 2 kept (40.0%), with these rules 3 (60.0%). Nothing was written." in shown
    assert stage.files() == old


def test_filters_that_take_long_say_how_far_they_are(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.completions()
    stage.rules(RULES, dedup={})
    stage.filter()
    assert "so far" not in capsys.readouterr().err
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0)
    stage.filter()
    said = capsys.readouterr().err
    assert "5 answers so far, 2 pass the rules\n" in said
    assert "1 of 2 answers compared, 0 duplicates\n" in said
    for flag in ("--dry-run", "--sweep=50"):
        stage.filter(flag)
        assert "1 answers judged so far\n" in capsys.readouterr().err


def test_dry_run_shows_ten_rows_of_each_side(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.completions(b"".join(encode_line(completion(n, "토끼가 당근을 먹었어요.")) for n in range(25)))
    stage.filter()
    stage.rules([{"rule": "length", "min_chars": 100}])
    capsys.readouterr()
    stage.filter("--dry-run")
    shown = capsys.readouterr().out
    assert "would be dropped (25)" in shown and shown.count("id00") == 10


def test_dry_run_wants_a_filtered_run_and_right_rules(stage: Stage) -> None:
    stage.completions()
    with pytest.raises(DataError, match=r"kept\.jsonl: no such file; run the filters first"):
        stage.filter("--dry-run")
    stage.filter()
    stage.rules([{"rule": "nothing"}])
    with pytest.raises(RecipeError, match=r"filters\.rules\[0\]: no rule named `nothing`"):
        stage.filter("--dry-run")


@pytest.mark.parametrize("reason", ["[/b] and [red]", r"\[/b]", "tail\\", "\x1b[31mred\r\n"])
def test_what_a_teacher_writes_is_no_markup(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    rule = RuleCount("mine", {}, 1, 1, 0, [Example("a", reason, "text")])
    report = FilterReport(1, 0, 1, 0.0, [rule], {}, {}, {}, ONE_PROMPT)
    print_report(report, Console(width=200))
    shown = capsys.readouterr().out
    assert reason.replace("\x1b", " ").split("\r")[0].strip() in shown and "\x1b" not in shown


def test_an_example_shows_what_was_said_and_what_was_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    said, wanted = '{"device":"door","room":"kitchen","state":"low"}', '{"device":"curtain","room":"kitchen"}'
    rule = RuleCount("matches", {}, 1, 1, 0, [Example("a", f"`{said}`, wanted: `{wanted}`", "text")])
    print_report(FilterReport(1, 0, 1, 0.0, [rule], {}, {}, {}, ONE_PROMPT), Console(width=80))
    cells = [line.split("│")[5].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "".join(cells).replace(" ", "") == f"`{said}`,wanted:`{wanted}`"


def test_the_name_of_a_column_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    slots = {"price [/kg]": {"1": SlotCount(2, 1, 0.5), "2": SlotCount(2, 2, 1.0)}}
    print_report(FilterReport(4, 3, 1, 0.75, [], {}, slots, {}, ONE_PROMPT), Console(width=200))
    assert "price [/kg]" in capsys.readouterr().out


def test_the_client_is_imported_for_a_judge_only() -> None:
    code = "import sys, filters.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"aiohttp", "generate.run"} & set(done.stdout.split())
