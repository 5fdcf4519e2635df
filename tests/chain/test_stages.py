"""Stages as the chain runs them, in a real terminal, against a real local server."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import chain.__main__
from chain.stages import StageFailed, stage, teacher
from pipeline.errors import DistillError, RecipeError, RequestsFailed, UsageError
from pipeline.lineage import record_lineage
from pipeline.rundir import RunDir
from serve.server import free_port
from tests.servers.misbehaving_server import (
    MisbehavingServer,
    answer,
    completions,
    error,
    held_until,
    misbehaving,
    one_bad,
    recipe_for,
)
from tests.servers.serve_process import wait_until
from tests.tiny_student import tiny_model

pytestmark = pytest.mark.timeout(700)  # commands of a busy machine import torch; `wait_until` gives up before

ROOT = Path(__file__).parents[2]
IN_FLIGHT = 64


def write_recipe(server: MisbehavingServer | str, folder: Path, **sections: Any) -> Path:
    recipe = recipe_for(server, 3 * IN_FLIGHT, **sections).model_dump(mode="json")
    recipe["student"] = {"model": str(tiny_model(folder / "student"))}
    recipe["generate"] |= {"concurrency": IN_FLIGHT, "request_timeout_s": 100}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start_in_terminal(command: list[str]) -> "tuple[subprocess.Popen[bytes], int, list[bytes]]":
    """Starts the command in a terminal of its own; what it prints is collected beside the test.

    Returns the process, the terminal's file descriptor (a byte 3 written to it is Ctrl-C), and the output so far.
    """
    terminal, side = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, cwd=ROOT, start_new_session=True, preexec_fn=take_terminal
    )
    os.close(side)
    output: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(terminal, 4096):
                output.append(data)
        except OSError:
            pass  # the terminal's other side is closed: the process has ended

    threading.Thread(target=read, daemon=True).start()
    return process, terminal, output


def start_chain(server: MisbehavingServer, run: RunDir) -> "tuple[subprocess.Popen[bytes], int, list[bytes]]":
    """The chain in a terminal, once all requests that may be in flight are."""
    recipe = write_recipe(server, run.path.parent)
    process, terminal, said = start_in_terminal([sys.executable, "-m", "chain", str(recipe), "--run", str(run.path)])
    wait_until(lambda: len(server.asked) == IN_FLIGHT, said=lambda: b"".join(said).decode())
    return process, terminal, said


def test_ctrl_c_in_a_terminal_leaves_generate_its_grace(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    stopping = threading.Event()
    with misbehaving(lambda asked: held_until(stopping)) as server:
        process, terminal, said = start_chain(server, run)
        os.write(terminal, b"\x03")
        wait_until(lambda: b"stopping: a moment for" in b"".join(said), said=lambda: b"".join(said).decode())
        stopping.set()
        assert process.wait(60) == 130, b"".join(said).decode()
    assert len(completions(run)) == len(server.asked) == IN_FLIGHT


def test_ctrl_c_twice_stops_at_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(lambda asked: answer(delay_s=600)) as server:
        process, terminal, said = start_chain(server, run)
        os.write(terminal, b"\x03")
        wait_until(lambda: b"stopping: a moment for" in b"".join(said), said=lambda: b"".join(said).decode())
        os.write(terminal, b"\x03")
        assert process.wait(60) == 130, b"".join(said).decode()
    assert completions(run) == []


def test_a_stage_that_fails_ends_the_chain_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="`python -m filters` ended with 2") as caught:
        stage("filters", RunDir(tmp_path / "none"), ROOT / "recipes" / "demo.yaml", [])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("status", "proxy"), [(401, False), (200, True)])
def test_a_running_server_is_never_started_again(
    status: int, proxy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a 401 without the key nor a proxy of the environment makes a running server look absent."""

    class Lists(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "stub"}]}')

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("chain.stages.serving", lambda *_, **__: pytest.fail("a second server was started"))
    with HTTPServer(("127.0.0.1", 0), Lists) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with teacher(recipe_for(f"http://127.0.0.1:{server.server_port}/v1"), RunDir(tmp_path)):
            pass
        server.shutdown()


@pytest.mark.parametrize("code", [-9, -15])
def test_a_stage_that_was_killed_is_told_as_a_shell_tells_it(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chain.stages.run_child", lambda command, **_: code)
    with pytest.raises(StageFailed, match=r"was ended by SIG(KILL|TERM); see why, and run") as caught:
        stage("train", RunDir(tmp_path), tmp_path / "recipe.yaml", [])
    assert caught.value.exit_code == 128 - code


@pytest.mark.parametrize(
    ("ended", "says"), [(1, "vLLM ended while it was asked: no memory"), (None, "`python -m generate`")]
)
def test_a_stage_that_failed_as_the_teacher_ended_is_told_with_the_cause(
    ended: int | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def serving(model: str, **_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(
            base_url="",
            startup_s=0.0,
            wait=lambda seconds: ended,
            failure=lambda when: DistillError(f"vLLM ended {when}: no memory"),
        )

    monkeypatch.setattr("chain.stages.serving", serving)
    monkeypatch.setattr("chain.stages.run_child", lambda command, **_: 1)
    recipe, run = recipe_for(f"http://127.0.0.1:{free_port()}/v1"), RunDir(tmp_path / "run")
    with pytest.raises(DistillError, match=says), teacher(recipe, run):
        stage("generate", run, tmp_path / "recipe.yaml", [])


def test_a_teacher_whose_servers_a_file_names_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chain.stages.serving", lambda *_, **__: pytest.fail("a server was started"))
    recipe = recipe_for(f"http://127.0.0.1:{free_port()}/v1", teacher={"model": "stub", "urls_file": "urls.txt"})
    with teacher(recipe, RunDir(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("sections", "up"),
    [
        ({}, []),
        ({"filters": {"judge": {"min_score": 3}}}, ["generate", "filters"]),
        ({"filters": {"judge": {"min_score": 3, "base_url": "http://127.0.0.1:9/v1"}}}, []),
        ({"train": {"method": "kd", "kd": {"teacher": "served"}}}, ["train"]),
        ({"train": {"method": "kd"}}, []),
        ({"train": {"method": "lora", "kd": {"teacher": "served"}}}, []),
    ],
)
def test_with_all_answers_there_the_teacher_is_served_for_the_stages_that_may_still_ask_it(
    sections: dict[str, Any], up: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, running = list[str](), list[str]()

    @contextmanager
    def serving(model: str, **_: object) -> Iterator[SimpleNamespace]:
        running.append(model)
        yield SimpleNamespace(base_url="", startup_s=0.0)
        running.clear()

    def note(name: str, run: RunDir, recipe: Path, flags: object, keep_up: object = None) -> int:
        assert (keep_up is not None) == bool(running)
        served.extend([name] * bool(running))
        return 4 if name == "filters" else 0

    monkeypatch.setattr("chain.stages.serving", serving)
    monkeypatch.setattr(chain.__main__, "stage", note)
    monkeypatch.setattr(chain.__main__, "pending", lambda *_: 0)
    recipe = write_recipe(f"http://127.0.0.1:{free_port()}/v1", tmp_path, **sections)
    with pytest.raises(RequestsFailed, match=r"the judge gave no answer about some rows; see .*dropped"):
        chain.__main__.main([str(recipe), "--run", str(tmp_path / "run")])
    assert served == up


def test_an_evaluation_with_requests_that_failed_ends_the_chain_with_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the judge or of a model: the report says whose."""
    monkeypatch.setattr(chain.__main__, "stage", lambda name, *_: 4 if name == "evaluate" else 0)
    monkeypatch.setattr(chain.__main__, "pending", lambda *_: 0)
    recipe = write_recipe(f"http://127.0.0.1:{free_port()}/v1", tmp_path)
    with pytest.raises(RequestsFailed, match=r"^some requests of the evaluation failed .*; see .*report\.html"):
        chain.__main__.main([str(recipe), "--run", str(tmp_path / "run")])


def test_a_recipe_that_is_edited_meanwhile_is_followed_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(f"http://127.0.0.1:{free_port()}/v1", tmp_path)

    def edit(name: str, *_: object) -> int:
        if name == "train":
            recipe.write_text(recipe.read_text() + "\n# other settings\n")
        return 0

    monkeypatch.setattr(chain.__main__, "stage", edit)
    monkeypatch.setattr(chain.__main__, "pending", lambda *_: 0)
    monkeypatch.setattr(chain.__main__, "last_words", lambda *_: [])
    chain.__main__.main([str(recipe), "--run", str(tmp_path / "run")])
    *_, before, said = capsys.readouterr().out.split("──")
    assert "has changed" not in before and f"note: {recipe} has changed since this command began" in said


@pytest.mark.parametrize("section", ["filters", "evaluate"])
def test_a_wrong_rule_is_told_before_anything_is_asked(section: str, tmp_path: Path) -> None:
    wrong = {"filters": {"rules": [{"rule": "length", "min": 9}]}, "evaluate": {"verify": [{"rule": "choice"}]}}
    with misbehaving() as server:
        recipe = write_recipe(server, tmp_path, **{section: wrong[section]})
        with pytest.raises(RecipeError, match=r"(filters\.rules|evaluate\.verify)\[0\]"):
            chain.__main__.main([str(recipe), "--run", str(tmp_path / "run")])
        assert server.asked == []


def test_terms_that_stop_a_training_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    with misbehaving() as server:
        recipe = write_recipe(server, tmp_path)
        command = [str(recipe), "--run", str(tmp_path / "run"), "--teacher.model", "gpt-4.1-mini", "--dry-run"]
        with pytest.raises(
            UsageError, match=r"check licence: .*OpenAI.* train\.accept: \[licence\]; nothing was asked"
        ):
            chain.__main__.main(command)
        chain.__main__.main([*command, "--train.accept", "licence"])
        assert server.asked == []


def test_the_chain_stops_where_another_teacher_gave_the_answers_before_it_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = write_recipe(f"http://127.0.0.1:{free_port()}/v1", tmp_path), RunDir(tmp_path / "run")
    command, stages = [str(recipe), "--run", str(run.path)], list[str]()

    def note(name: str, *_: object) -> int:
        stages.append(name)
        return 0

    run.path.mkdir()
    record_lineage(run, "generate", {"teacher": {"asked": "gpt-4.1"}})
    run.completions.touch()
    monkeypatch.setattr(chain.__main__, "stage", note)
    monkeypatch.setattr(chain.__main__, "last_words", lambda *_: [])
    monkeypatch.setattr(chain.__main__, "pending", lambda *_: 0)
    with pytest.raises(UsageError, match=r"check teacher: gpt-4\.1 gave the answers, not .*; nothing was asked"):
        chain.__main__.main(command)
    monkeypatch.setattr(chain.__main__, "pending", lambda *_: 1)
    with pytest.raises(UsageError, match=r"check licence: gpt-4\.1, OpenAI"):  # the answers that there are
        chain.__main__.main(command)
    assert stages == []
    run.completions.unlink()
    chain.__main__.main([*command, "--dry-run"])
    assert stages == ["generate"]


def test_a_dry_run_of_the_chain_is_that_of_generate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with misbehaving() as server:
        recipe = write_recipe(server, tmp_path)
        chain.__main__.main([str(recipe), "--run", str(tmp_path / "run"), "--dry-run"])
        assert server.asked == [] and f"{3 * IN_FLIGHT} to ask" in capfd.readouterr().out


def test_the_teacher_is_served_at_the_host_of_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, asked = free_port(), list[tuple[str, int]]()

    @contextmanager
    def serving(model: str, *, host: str, port: int, **_: object) -> Iterator[SimpleNamespace]:
        asked.append((host, port))
        yield SimpleNamespace(base_url="", startup_s=0.0)

    monkeypatch.setattr("chain.stages.serving", serving)
    with teacher(recipe_for(f"http://127.0.0.2:{port}/v1"), RunDir(tmp_path / "run")):
        assert asked == [("127.0.0.2", port)]


def test_nothing_is_served_when_all_that_is_left_has_failed_for_good(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(one_bad(error(400, "no"))) as server:
        recipe = write_recipe(server, tmp_path)
        assert stage("generate", run, recipe, ["--quiet"]) == 4
    done = subprocess.run(  # the server is gone; a floor that no run reaches ends the chain after the filters
        [
            *(sys.executable, "-m", "chain", str(recipe), "--run", str(run.path)),
            *("--filters.min_keep_rate", "1", "--filters.rules", '[{"rule": "length", "min_chars": 1000}]'),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "serving " not in done.stdout
    assert f"{3 * IN_FLIGHT} requests, {3 * IN_FLIGHT - 1} answered (0 now" in done.stdout
    assert done.returncode == 1 and "keep rate 0.0% is under" in done.stderr


def test_a_second_chain_on_a_run_is_refused_before_it_starts_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stages = RunDir(tmp_path / "run"), list[str]()
    recipe = write_recipe(f"http://127.0.0.1:{free_port()}/v1", tmp_path)
    command = [str(recipe), "--run", str(run.path)]

    @contextmanager
    def serving(model: str, **_: object) -> Iterator[SimpleNamespace]:
        """The first chain's server starts; its stages have not begun."""
        second = subprocess.run([sys.executable, "-m", "chain", *command], cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2 and f"another process (pid {os.getpid()}) works on this run" in second.stderr
        assert "serving" not in second.stdout
        yield SimpleNamespace(base_url="", startup_s=0.0)

    def note(name: str, *_: object) -> int:
        stages.append(name)
        with run.locked():  # the chain's own lock is another one
            return 0

    monkeypatch.setattr("chain.stages.serving", serving)
    monkeypatch.setattr(chain.__main__, "stage", note)
    monkeypatch.setattr(chain.__main__, "last_words", lambda *_: [])
    chain.__main__.main(command)
    assert stages == ["generate", "filters", "train", "evaluate"]
