"""`generate.processes`: one run over several processes, and what is left when any of them dies."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from generate.jobs import Partition, build_jobs
from generate.journal import Journal
from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.errors import BudgetReached, DistillError
from pipeline.records import Completion, read_jsonl
from pipeline.rundir import RunDir
from tests.generate.test_cli import finish, start, until_answered
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    completions,
    error,
    failures,
    misbehaving,
    recipe_for,
    whole,
)

ROOT = Path(__file__).parents[2]
TWO = {"concurrency": 8, "processes": 2}


def slow(server_delay_s: float = 0.05) -> object:
    return misbehaving(lambda asked: answer(delay_s=server_delay_s))


def test_every_request_is_asked_once_and_the_counts_are_their_sum(run: RunDir) -> None:
    with misbehaving(lambda asked: error(400) if asked.text == "say 3" else answer(delay_s=0.01)) as server:
        summary = generate(recipe_for(server, 300, generate=TWO), run, quiet=True)
        assert len(server.asked) == 300
        assert server.most_at_once <= 8
        again = generate(recipe_for(server, 300, generate={"concurrency": 8}), run, quiet=True)
    assert (summary.answered, summary.failed, summary.completion_tokens) == (299, 1, 299 * 5)
    assert (again.resumed, again.answered) == (299, 0)  # one process or several: the same requests
    assert whole(run, 299)


def test_what_a_users_rows_print_is_not_taken_for_the_counts(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text(
        "import subprocess\n"
        "def rows():\n"
        "    print('reading')\n"
        "    subprocess.run(['echo', 'reading'])\n"
        "    for n in range(20):\n"
        "        yield {'prompt': f'say {n}'}\n"
    )
    with misbehaving() as server:
        summary = generate(recipe_for(server, prompts={"file": tmp_path / "p.py"}, generate=TWO), run, quiet=True)
    assert (summary.answered, summary.failed) == (20, 0)
    assert whole(run, 20)


def test_no_more_are_in_flight_than_the_recipe_says(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.2)) as server:
        summary = generate(recipe_for(server, 30, generate={"concurrency": 1, "processes": 3}), run, quiet=True)
    assert (summary.answered, server.most_at_once) == (30, 1)


def test_what_ends_one_ends_all_with_its_error(run: RunDir) -> None:
    with misbehaving(lambda asked: error(401, "wrong key")) as server, pytest.raises(DistillError, match="wrong key"):
        generate(recipe_for(server, 300, generate=TWO), run, quiet=True)


def test_a_flagged_prompt_that_is_all_of_its_part_fails_alone(run: RunDir) -> None:
    """Its process ends before the other has had an answer."""
    script = lambda asked: error(403, "flagged") if asked.text == "say 3" else answer(delay_s=1)  # noqa: E731
    with misbehaving(script) as server:
        recipe = recipe_for(server, 4, generate={"concurrency": 8, "processes": 4})
        summary = generate(recipe, run, quiet=True)
    assert (summary.answered, summary.failed) == (3, 1)


def test_a_short_run_that_is_forbidden_altogether_has_no_failures(run: RunDir) -> None:
    words = "4 requests in a row end with forbidden"
    with misbehaving(lambda asked: error(403, "not for you")) as server, pytest.raises(DistillError, match=words):
        generate(recipe_for(server, 4, generate=TWO), run, quiet=True)
    assert not failures(run)


def test_a_budget_holds_over_all_of_them(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        recipe = recipe_for(server, 300, generate=TWO, budget={"tokens": 3000}, sampling={"max_tokens": 5})
        with pytest.raises(BudgetReached, match=r"2,[789]\d\d of budget\.tokens 3,000 spent"):
            generate(recipe, run, quiet=True)
        assert 3000 - 250 < 12 * len(server.asked) <= 3000  # all but what one more request could cost, not one each


def test_a_part_of_the_budget_that_is_spent_leaves_the_others_theirs(run: RunDir, tmp_path: Path) -> None:
    """Every second prompt is long: one process spends its part, and the other's pays for the rest."""
    rows = [{"prompt": f"say {n}" + (" x" * 400 if n % 2 else "")} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"file": str(tmp_path / "rows.jsonl")}
    with misbehaving(lambda asked: answer(usage=len(asked.text) < 100)) as server:  # the long ones stay charged in full
        recipe = recipe_for(
            server, prompts=prompts, generate=TWO, budget={"tokens": 24_000}, sampling={"max_tokens": 5}
        )
        assert generate(recipe, run, quiet=True).answered == 40
    assert whole(run, 40)


def children(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def started(server: MisbehavingServer, run: RunDir, *flags: str) -> "subprocess.Popen[str]":
    return start(server, run, 400, "--generate.processes", "2", "--quiet", *flags)


def test_killed_with_its_parent_nothing_is_lost_or_repeated(run: RunDir) -> None:
    with slow() as server:  # type: ignore[attr-defined]
        process = started(server, run)
        until_answered(run, 30)
        family = children(process)
        assert len(family) == 2
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        held = len(run.completions.read_bytes().splitlines())
        code, out, _ = finish(started(server, run))
    assert code == 0
    assert f"{held} earlier" in out
    assert whole(run, 400)


def test_one_of_them_killed_ends_the_run_and_the_next_goes_on(run: RunDir) -> None:
    with slow() as server:  # type: ignore[attr-defined]
        process = started(server, run)
        until_answered(run, 30)
        children(process)[0].kill()
        code, _, err = finish(process)
        said = "a process of this run was killed (out of memory?); run the same command again"
        assert (code, said in " ".join(err.split())) == (1, True)
        assert finish(started(server, run))[0] == 0
    assert whole(run, 400)


def test_what_the_disk_does_not_take_is_one_line(run: RunDir) -> None:
    blocked = run.path / "spend-0.json.tmp"
    blocked.mkdir(parents=True)
    with slow() as server:  # type: ignore[attr-defined]
        code, _, err = finish(started(server, run))
        assert (code, err) == (1, f"error: {blocked}: Is a directory\n")
        blocked.rmdir()
        assert finish(started(server, run))[0] == 0
    assert whole(run, 400)


@pytest.mark.parametrize("to_all", [False, True], ids=["Ctrl-C", "SIGTERM to every process"])
def test_an_interrupt_stops_all_in_order(run: RunDir, to_all: bool) -> None:
    with slow() as server:  # type: ignore[attr-defined]
        process = started(server, run)
        until_answered(run, 30)
        family = children(process)
        process.send_signal(signal.SIGTERM if to_all else signal.SIGINT)
        for child in family if to_all else ():
            child.terminate()
        code, _, _ = finish(process)
        assert code == 130
        assert not psutil.wait_procs(family, timeout=5)[1]
        asked = len(server.asked)
        assert len(completions(run)) == asked  # what was in flight was waited for
        assert finish(started(server, run))[0] == 0
    assert whole(run, 400)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_terminal_that_closes_loses_no_answer_in_flight(run: RunDir, processes: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with slow(0.3) as server:  # type: ignore[attr-defined]
            process = started(server, run, "--generate.processes", str(processes))
            until_asked(server, 8)
            process.send_signal(signal.SIGHUP)
            assert process.stderr
            assert any("stopping: a moment" in line for line in process.stderr)
            process.send_signal(signal.SIGHUP)  # the shell sends one, and so does the kernel
            assert finish(process)[0] == 130
            assert len(completions(run)) == len(server.asked)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_stops_all_at_once(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One interrupt alone would wait for those in flight, which are answered after 60 s."""
    (tmp_path / "sitecustomize.py").write_text("import generate.loop\ngenerate.loop.GRACE_S = 90.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")  # in the run's own processes
    with slow(60.0) as server:  # type: ignore[attr-defined]
        process = started(server, run, "--generate.request_timeout_s", "90")
        until_asked(server, 8)
        family = children(process)
        for child in family:
            child.suspend()  # as if too busy to see the first before the second comes
        process.send_signal(signal.SIGINT)
        assert process.stderr
        assert any("stopping: a moment" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        for child in family:
            child.resume()
        assert finish(process)[0] == 130
    assert not completions(run)


def test_when_one_cannot_go_on_what_the_others_have_in_flight_is_waited_for(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import generate.loop\ngenerate.loop.GRACE_S = 0.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")  # in the run's own processes

    of_first = list[str]()  # process; it cannot go on as soon as all have something in flight

    def script(asked: Asked) -> Behaviour:
        return with_all_in_flight(error(402) if asked.text in of_first else answer(delay_s=3))

    def with_all_in_flight(then: Behaviour) -> Behaviour:
        async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
            while len(server.asked) < 8:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            return await then(request, asked)

        return behave

    with misbehaving(script) as server:
        recipe = recipe_for(server, 400)
        jobs = build_jobs(iter_prompts(recipe), recipe, Partition(0, 2))
        of_first += [job.request.messages[-1].content for job in jobs]
        code, _, err = finish(started(server, run, "--generate.request_timeout_s", "100"))
        assert len(server.asked) == 8
    assert (code, "the quota is used up" in err) == (1, True)
    assert len(completions(run)) == 4


def until_asked(server: MisbehavingServer, count: int) -> None:
    """Waits until so many requests are in flight at the server."""
    deadline = time.monotonic() + 30
    while server.at_once < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_run_is_refused_while_children_of_a_killed_one_are_there(run: RunDir) -> None:
    """They hold the run's lock with their parent, so nobody can begin before the last of them is gone."""
    killed = list[bool]()
    with misbehaving(lambda asked: answer(delay_s=0 if killed else 0.2)) as server:
        process = started(server, run)
        until_asked(server, 8)
        family = children(process)
        for child in family:
            child.suspend()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        killed.append(True)
        code, _, err = finish(started(server, run))
        assert (code, "another process" in err) == (2, True)
        for child in family:
            child.kill()
        psutil.wait_procs(family, timeout=5)
        assert finish(started(server, run))[0] == 0
    assert whole(run, 400)


WRITER = """
import sys
from pathlib import Path
from generate.journal import Journal
from generate.prompts import iter_prompts
from pipeline.records import Completion
import msgspec
lines = [line for line in Path(sys.argv[2]).read_bytes().splitlines()]
with Journal(Path(sys.argv[1]), Completion) as journal:
    for line in lines:
        journal.append(msgspec.json.decode(line, type=Completion))
"""


def test_two_writers_at_once_leave_every_line_whole(run: RunDir, tmp_path: Path) -> None:
    with misbehaving(lambda asked: answer("이야기 🐰 " * 3000)) as server:
        generate(recipe_for(server, 60), run, quiet=True)
    lines = [json.loads(line) for line in run.completions.read_bytes().splitlines()]
    writers = []
    for part in range(3):
        source = tmp_path / f"{part}.jsonl"
        source.write_text("".join(json.dumps({**line, "id": f"{part}-{n}"}) + "\n" for n, line in enumerate(lines)))
        command = [sys.executable, "-c", WRITER, str(tmp_path / "shared.jsonl"), str(source)]
        writers.append(subprocess.Popen(command, cwd=ROOT))
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len({record.id for record in read_jsonl(tmp_path / "shared.jsonl", Completion)}) == 180


def test_a_writer_killed_at_a_line_is_mended_by_the_others(run: RunDir, tmp_path: Path) -> None:
    with misbehaving() as server:
        generate(recipe_for(server, 3), run, quiet=True)
    first, second, third = completions(run)
    path = tmp_path / "shared.jsonl"
    with Journal(path, Completion) as journal:
        journal.append(first)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b'{"id": "torn by a kill", "text": "' + b"x" * 200_000)
        os.close(fd)
        journal.append(second)
        journal.append(third)
    assert [record.id for record in read_jsonl(path, Completion)] == [first.id, second.id, third.id]


def test_what_failed_in_this_call_is_not_retried_in_it(run: RunDir, tmp_path: Path) -> None:
    """With --retry-failures and a budget, whose rest one last process spends."""
    rows = [{"prompt": f"say {n}" + " x" * 400 * (n % 2)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = {"say 0", "say 2", "say 4"}
    with misbehaving(lambda asked: answer("" if asked.text in bad else "yes", usage=len(asked.text) < 100)) as server:
        recipe = recipe_for(
            server, prompts={"file": tmp_path / "rows.jsonl"}, generate=TWO, budget={"tokens": 24_000},
            sampling={"max_tokens": 5},
        )  # fmt: skip
        summary = generate(recipe, run, quiet=True, retry_failures=True)
        asked = Counter(one.text for one in server.asked)
        assert set(asked.values()) == {1} and summary.failed + summary.answered == 40 == len(asked)
        generate(recipe, run, quiet=True, retry_failures=True)
        assert {text for text, times in (Counter(one.text for one in server.asked) - asked).items() if times} == bad
