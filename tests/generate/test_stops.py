"""What stops a run: the endpoint, the key, the data, the disk, the user; and what is left then."""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pipeline.cli
from generate.context import Left
from generate.endpoint import Endpoint
from generate.jobs import Job
from generate.loop import Loop
from generate.run import generate, pending
from pipeline.errors import BudgetReached, DataError, DistillError, RecipeError
from pipeline.lineage import read_lineage
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    answer,
    completions,
    error,
    failures,
    misbehaving,
    raw,
    recipe_for,
    whole,
)

KEY = "sk-very-secret-0123456789"


pytestmark = pytest.mark.usefixtures("quick")


@contextmanager
def interrupted_when(holds: Callable[[], object], after_s: float = 0.0) -> Iterator[None]:
    """Ctrl-C, once this holds, and so long after."""
    over = threading.Event()

    def interrupt() -> None:
        while not holds():
            if over.wait(0.01):
                return
        if not over.wait(after_s):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each call of a method of the loop that has returned."""
    calls, method = list[str](), getattr(Loop, name)

    def recorded(*args: Any, **options: Any) -> None:
        method(*args, **options)
        calls.append(name)

    monkeypatch.setattr(Loop, name, recorded)
    return calls


@pytest.mark.timeout(60, method="thread")  # if it breaks it never ends
def test_a_second_interrupt_stops_now(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a grace and an answer that outlast the test's time, only the second interrupt can end it."""
    monkeypatch.setattr("generate.loop.GRACE_S", 1000)
    interrupts = calls_of("interrupt", monkeypatch)
    with misbehaving(lambda asked: answer(delay_s=0 if asked.text == "say 3" else 1000)) as server:
        config = {"concurrency": 8, "request_timeout_s": 2000}
        at_work = lambda: server.at_once == 8 and run.completions.exists() and completions(run)  # noqa: E731
        with interrupted_when(at_work), interrupted_when(lambda: interrupts), pytest.raises(KeyboardInterrupt):
            generate(recipe_for(server, generate=config), run, quiet=True)
    assert len(completions(run)) == 1


def test_sigterm_while_the_endpoints_are_looked_at_ends_the_run(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Reading(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            signal.raise_signal(signal.SIGTERM)

    async def terminated(self: Endpoint) -> None:
        """The signal comes while the loop reads from a connection."""
        own, other = socket.socketpair()
        with other:
            other.send(b"x")
            await asyncio.get_running_loop().create_connection(Reading, sock=own)
            await asyncio.sleep(20)

    monkeypatch.setattr(Endpoint, "prepare", terminated)
    before = signal.signal(signal.SIGTERM, pipeline.cli._interrupt)  # as run_stage has it
    try:
        with misbehaving() as server, pytest.raises(KeyboardInterrupt):
            generate(recipe_for(server), run, quiet=True)
        assert signal.getsignal(signal.SIGTERM) is pipeline.cli._interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not server.asked
    assert "Fatal error" not in caplog.text


def test_waiting_requests_do_not_pile_up_without_bound(run: RunDir) -> None:
    """A server that is only busy is not sent the whole run: at most a few waiting requests a slot."""
    asked_first: set[str] = set()

    def script(asked: Asked) -> Behaviour:
        asked_first.add(asked.text)
        return error(503, retry_after="30")

    with misbehaving(script) as server:
        recipe = recipe_for(server, 500, generate={"concurrency": 4})
        with interrupted_when(lambda: len(asked_first) >= 4, after_s=1.5), pytest.raises(KeyboardInterrupt):
            generate(recipe, run, quiet=True)
    assert 4 <= len(asked_first) <= 4 * 5


def test_failures_are_left_alone_until_they_are_asked_for(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    broken = True
    with misbehaving(lambda asked: error(400) if broken and asked.text == "say 3" else answer()) as server:
        recipe = recipe_for(server)
        assert generate(recipe, run, quiet=True).failed == 1
        broken = False
        again = generate(recipe, run, quiet=True)
        assert (again.failed, again.answered, len(server.asked)) == (1, 0, 10)
        assert "--retry-failures asks them again" in capsys.readouterr().err
        assert pending(recipe, run) == 0  # what failed for good is left alone
        healed = generate(recipe, run, quiet=True, retry_failures=True)
        assert (healed.failed, healed.answered, healed.completed) == (0, 1, 10)
        assert generate(recipe, run, quiet=True).failed == 0
    assert len(completions(run)) == 10
    assert len(failures(run)) == 1  # the journal is not rewritten; the answer counts


@pytest.mark.parametrize("processes", [1, 2])
def test_failures_that_a_budget_keeps_from_a_retry_are_failures_still(run: RunDir, processes: int) -> None:
    broken = True

    def script(asked: Asked) -> Behaviour:
        return error(400) if broken and asked.text in ("say 0", "say 1", "say 2") else answer()

    with misbehaving(script) as server:
        given = {"sampling": {"max_tokens": 20}, "generate": {"concurrency": 1, "processes": processes}}
        assert generate(recipe_for(server, 8, **given), run, quiet=True).failed == 3
        broken = False
        tight = recipe_for(server, 8, budget={"tokens": 5 * 12 + 12 + 215}, **given)
        with pytest.raises(BudgetReached):
            generate(tight, run, quiet=True, retry_failures=True)
    found = read_lineage(run)["generate"]
    assert found["failed"] == 3 - found["last_call"]["answered"] == 8 - found["completed"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (error(401, "wrong key"), ["401 (wrong key)", "OPENAI_API_KEY is not set"]),
        (error(429, "pay first", "insufficient_quota"), ["the quota is used up (pay first)"]),
        (error(404, "no model stub"), ["404 (no model stub)", "it lists big, small: set teacher.model"]),
        (raw(b"", 308, location="https://else.where/"), ["308", "it redirects to https://else.where/"]),
    ],
)
def test_what_no_request_can_survive_stops_the_run_at_once(run: RunDir, bad: Behaviour, words: list[str]) -> None:
    with misbehaving(lambda asked: bad, models=["big", "small"]) as server:
        with pytest.raises(DistillError) as caught:
            generate(recipe_for(server, 500), run, quiet=True)
        assert len(server.asked) <= 8
    assert caught.value.exit_code == 1
    for expected in words:
        assert expected in str(caught.value)
    assert not failures(run)


def test_paid_answers_in_flight_are_waited_for_when_the_quota_ends(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("generate.loop.GRACE_S", 0.0)
    with misbehaving(lambda asked: error(402) if asked.text == "say 3" else answer(delay_s=0.5)) as server:
        with pytest.raises(DistillError, match="the quota is used up"):
            generate(recipe_for(server, 8), run, quiet=True)
        assert len(completions(run)) == 7
    assert "nothing new goes out; waiting for 7 requests in flight" in capsys.readouterr().err


@pytest.mark.timeout(60, method="thread")  # if it breaks it never ends
def test_an_interrupt_ends_that_wait(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.loop.GRACE_S", 0.2)
    ends = calls_of("_end", monkeypatch)
    with misbehaving(lambda asked: error(402) if asked.text == "say 3" else answer(delay_s=1000)) as server:
        config = {"concurrency": 8, "request_timeout_s": 2000}
        with interrupted_when(lambda: ends), pytest.raises(DistillError, match="the quota is used up"):
            generate(recipe_for(server, 8, generate=config), run, quiet=True)


def test_nothing_at_the_url(run: RunDir) -> None:
    with misbehaving() as server:
        url = server.url
    with pytest.raises(DistillError) as caught:
        generate(recipe_for(url, 500), run, quiet=True)
    assert url in str(caught.value)
    assert "make serve" in str(caught.value)
    assert not failures(run)


def test_a_server_that_dies_ends_the_run_and_not_its_requests(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        if len(server.asked) > 40:
            server.die()
        return answer(delay_s=0.01)

    with misbehaving(script) as server, pytest.raises(DistillError, match="has not answered for"):
        config = {"concurrency": 8, "give_up_s": 0.5, "request_timeout_s": 1}
        generate(recipe_for(server, 2000, generate=config), run, quiet=True)
    assert 0 < len(completions(run)) < 2000
    assert not failures(run)


def test_the_key_reaches_the_server_and_nothing_else(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    echo = error(400, "x" * 980 + f" Bearer {KEY} is cut where messages are shortened")

    def script(asked: Asked) -> Behaviour:
        assert asked.headers["Authorization"] == f"Bearer {KEY}"
        return echo if asked.text == "say 3" else answer()

    with misbehaving(script) as server:
        recipe = recipe_for(server, teacher={"model": "stub", "base_url": server.url, "api_key_env": "MY_KEY"})
        assert generate(recipe, run).answered == 9
    with misbehaving(lambda asked: error(401, f"Incorrect API key provided: {KEY}")) as server:
        recipe = recipe_for(server, teacher={"model": "stub", "base_url": server.url, "api_key_env": "MY_KEY"})
        with pytest.raises(DistillError) as caught:
            generate(recipe, run)
    assert "[secret]" in str(caught.value)
    shown = str(caught.value) + "".join(capsys.readouterr())
    written = b"".join(path.read_bytes() for path in run.path.iterdir())
    for part in (KEY, KEY[:10]):
        assert part not in shown
        assert part.encode() not in written


def test_a_password_in_the_url_is_refused_before_it_is_written(run: RunDir) -> None:
    with pytest.raises(RecipeError) as caught:
        generate(recipe_for("http://me:hunter2@127.0.0.1:1/v1"), run, quiet=True)
    assert "hunter2" not in str(caught.value)
    assert [path.name for path in run.path.iterdir()] == [".lock"]


def test_a_bad_prompt_file_ends_the_run_before_anything_is_asked(run: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' * 50 + "{\n")
    with misbehaving() as server:
        with pytest.raises(DataError, match=r"p\.jsonl:51: "):
            generate(recipe_for(server, prompts={"file": path}), run, quiet=True)
        assert not server.asked
    assert not run.prompts.exists()


def test_a_journal_that_cannot_be_written_stops_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    write = os.write

    def full(fd: int, data: bytes) -> int:
        nonlocal written
        if data.startswith(b'{"id"'):
            written += 1
            if written > 5:
                write(fd, data[:20])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    with misbehaving() as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(DistillError, match="No space left on device"):
                generate(recipe_for(server, 100), run, quiet=True)
        assert len(completions(run)) == 5
        assert generate(recipe_for(server, 100), run, quiet=True).resumed == 5
    assert whole(run, 100)


@pytest.mark.parametrize("share", [False, True])
def test_ctrl_c_ends_a_run_that_passes_over_many_answers(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    """A run of a million prompts that goes on looks at all that is answered before it sends its first request."""
    monkeypatch.setattr("generate.jobs.PASSED", 10)
    rows, looked, has = [f'{{"prompt": "say {n}"}}\n' for n in range(200)], 0, Left.has

    def interrupted(left: Left, job: Job) -> bool:
        nonlocal looked
        looked += 1
        if looked == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return has(left, job)

    with misbehaving() as server:
        config = {"concurrency": 8, "share_prompt": share}
        recipe = recipe_for(server, prompts={"file": tmp_path / "p.jsonl"}, generate=config)
        (tmp_path / "p.jsonl").write_text("".join(rows))
        generate(recipe, run, quiet=True)
        (tmp_path / "p.jsonl").write_text("".join([*rows[:100], '{"prompt": "say more"}\n', *rows[100:]]))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Left, "has", interrupted)
            generate(recipe, run, quiet=True)
        assert 30 <= looked < 60 and len(server.asked) == 200
        generate(recipe, run, quiet=True)
    assert whole(run, 201)


def test_a_process_that_a_users_rows_end_stops_nothing(run: RunDir, tmp_path: Path) -> None:
    """As multiprocessing.Pool ends its own: by SIGTERM, which a process forked beside the loop shared with it."""
    (tmp_path / "p.py").write_text(
        "import multiprocessing, time\n"
        "fork = multiprocessing.get_context('fork')\n"
        "def work(pipe):\n"
        "    pipe.send(None)\n"
        "    time.sleep(60)\n"
        "def rows():\n"
        "    ours, theirs = fork.Pipe()\n"
        "    worker = fork.Process(target=work, args=(theirs,))\n"
        "    worker.start()\n"
        "    ours.recv()\n"
        "    worker.terminate()\n"
        "    worker.join()\n"
        "    assert worker.exitcode == -15\n"
        "    return [{'prompt': f'say {n}'} for n in range(10)]\n"
    )
    with misbehaving() as server:
        summary = generate(recipe_for(server, prompts={"file": tmp_path / "p.py"}), run, quiet=True)
    assert summary.answered == 10


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_gives_other_prompts_the_second_time_is_told(run: RunDir, tmp_path: Path, processes: int) -> None:
    (tmp_path / "p.py").write_text(
        "from pathlib import Path\n"
        "def rows():\n"
        "    seen = Path(__file__).with_name('seen')\n"
        "    count = 6 if seen.exists() else 10\n"
        "    seen.touch()\n"
        "    return [{'prompt': f'say {n}'} for n in range(count)]\n"
    )
    config = {"concurrency": 8, "processes": processes}
    with misbehaving() as server, pytest.raises(DataError, match=r"p\.py: 4 of 10 requests were not asked.*same"):
        generate(recipe_for(server, prompts={"file": tmp_path / "p.py"}, generate=config), run, quiet=True)
    assert len(completions(run)) == 6
