"""A run in a store, by the command that a user types: another machine, a lost one, Ctrl-C, and what came home."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import yaml

from scale.storage import Store, open_store
from tests.servers.misbehaving_server import Asked, Behaviour, MisbehavingServer, answer, misbehaving, recipe_for
from tests.servers.object_storage import object_storage
from tests.servers.serve_process import wait_until
from tests.tiny_student import make_recipe, make_run, story_rows, tiny_model

pytestmark = pytest.mark.timeout(400)  # they start nodes and commands, which takes long on a busy machine

ROOT = Path(__file__).parents[2]
SMALL_PARTS = (
    "import scale.parts; scale.parts.ROWS, scale.parts.SECONDS = 5, 1000; "
    "from scale.run_in_store import *; run_stage(main)"
)
STALE = "import scale.run_lease; scale.run_lease.STALE_S = 0; "


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_storage() as url:
        yield url


@pytest.fixture
def url(server: str, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}/stories"


def machine(path: Path, teacher: MisbehavingServer, count: int = 30, **sections: object) -> Path:
    """A folder to run in, with a recipe for the teacher."""
    path.mkdir()
    recipe = recipe_for(teacher, count, **sections).model_dump(mode="json", exclude={"student"})
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def start(place: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=place, env=environment, text=True, stdout=pipe, stderr=pipe, process_group=0
    )


def finish(process: "subprocess.Popen[str]", seconds: float = 100) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err
    return process.returncode, out, err


def stored_run(place: Path) -> Path:
    (run,) = place.glob("runs/stored/*/stories")
    return run


def ids(data: bytes | None) -> list[str]:
    return [json.loads(line)["id"] for line in (data or b"").splitlines()]


def test_another_machine_goes_on_and_a_third_fetches(tmp_path: Path, url: str) -> None:
    with misbehaving() as teacher:
        one = machine(tmp_path / "one", teacher)
        code, out, err = finish(start(one, "-m", "generate", "recipe.yaml", "--run", url, "--quiet"))
        assert (code, "30 answered (30 now, 0 earlier)" in out) == (0, True), err
        assert f"{url}: works in runs/stored/" in err
        store = open_store(url)
        rows = store.get("completions.jsonl")
        assert len(set(ids(rows))) == 30
        assert ids(rows) == sorted(ids(rows))
        assert rows == (stored_run(one) / "completions.jsonl").read_bytes()
        assert {"recipe.yaml", "lineage.json", "prompts.jsonl"} <= set(store.names())
        assert store.names("parts") == []

        two = machine(tmp_path / "two", teacher, 40)
        code, out, _ = finish(start(two, "-m", "generate", "recipe.yaml", "--run", url, "--quiet"))
        assert (code, "40 answered (" in out, len(teacher.asked)) == (0, True, 40)
        assert (stored_run(two) / "completions.jsonl").read_bytes() == store.get("completions.jsonl")

    assert finish(start(tmp_path, "-m", "scale.fetch", url, "home"))[:2] == (0, "home\n")
    assert (tmp_path / "home/completions.jsonl").read_bytes() == store.get("completions.jsonl")
    assert (tmp_path / "home/lineage.json").read_bytes() == store.get("lineage.json")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [True, False], ids=["machine lost", "process killed"])
def test_a_killed_run_goes_on(tmp_path: Path, url: str, lost: bool) -> None:
    """Killed with kill -9 at a moment when some parts are in the store, and some rows only on its machine."""
    store = open_store(url)
    held, patient = True, {"concurrency": 8, "request_timeout_s": 2000}
    slow = lambda asked: answer(delay_s=1000 if held and int(asked.text.split()[1]) >= 23 else 0)  # noqa: E731
    with misbehaving(slow) as teacher:
        one = machine(tmp_path / "one", teacher, budget={"tokens": 100_000}, generate=patient)
        command = ["-c", SMALL_PARTS, "generate", "recipe.yaml", "--run", url, "--quiet"]
        process = start(one, *command)
        wait_until(lambda: len(store.names("parts")) == 4 and _last_lease(store).get("unstored"))
        run = stored_run(one)
        wait_until(lambda: len(ids((run / "completions.jsonl").read_bytes())) == 23)
        os.killpg(process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it ends with the first
            os.kill(int((run / ".lock").read_text()), signal.SIGKILL)
        process.communicate()  # ends when no process holds the pipes, so after both kills
        held, asked = False, len(teacher.asked)
        assert store.get("spend.json")
        if lost:
            shutil.rmtree(one)
            one = machine(tmp_path / "other", teacher, budget={"tokens": 100_000}, generate=patient)
            code, _, err = finish(start(one, *command))
            assert (code, "works on this run" in err) == (2, True)
            command[1] = STALE + SMALL_PARTS
            code, _, err = finish(start(one, *command))
            assert (code, "with --take-over" in err, len(teacher.asked)) == (2, True, asked)
            command.append("--take-over")
        code, _, err = finish(start(one, *command))
        assert code == 0, err
    known = 20 if lost else 23
    assert len(teacher.asked) - asked == 30 - known
    assert len(ids(store.get("completions.jsonl"))) == len(set(ids(store.get("completions.jsonl")))) == 30
    spend = json.loads(store.get("spend.json") or b"")
    told = re.search(r"up to (\d+) answers of the lost machine are asked again; the budget counts (\d+) tokens", err)
    assert bool(told) == lost
    if told:
        assert int(told[1]) >= 3
        assert spend["unsaid"]["tokens"] >= int(told[2]) == int(told[1]) * 12


@pytest.mark.slow
def test_an_interrupt_puts_the_rest_and_gives_the_run_free(tmp_path: Path, url: str) -> None:
    store = open_store(url)
    with misbehaving(lambda asked: answer(delay_s=0.2)) as teacher:
        one = machine(tmp_path / "one", teacher, 1000)
        process = start(one, "-c", SMALL_PARTS, "generate", "recipe.yaml", "--run", url, "--quiet")
        wait_until(lambda: store.names("parts"))
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process)
    assert (code, _last_lease(store)["released"]) == (130, True), err
    local = set(ids((stored_run(one) / "completions.jsonl").read_bytes()))
    assert finish(start(tmp_path, "-m", "scale.fetch", url, "home"))[0] == 0
    assert set(ids((tmp_path / "home/completions.jsonl").read_bytes())) == local
    assert "parts/completions" in " ".join(store.names())  # compacted when the run is whole


@pytest.mark.slow
def test_a_training_goes_on_on_another_machine(tmp_path: Path, url: str) -> None:
    store, model = open_store(url), str(tiny_model(tmp_path / "model"))
    recipe = make_recipe(model, epochs=60).model_dump_json(exclude_unset=True)
    store.put("kept.jsonl", make_run(tmp_path / "run", story_rows(21)).kept)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(recipe)
    process = start(tmp_path / "one", "-m", "train", "recipe.yaml", "--force", "--run", url)
    wait_until(lambda: [*tmp_path.glob("one/runs/stored/*/stories/training/*/trainer_state.json")])
    training = int((stored_run(tmp_path / "one") / ".lock").read_text())
    os.kill(training, signal.SIGSTOP)  # else it may end, or replace each checkpoint, before one is put
    wait_until(lambda: [name for name in store.names("training") if name.endswith("trainer_state.json")])
    os.killpg(process.pid, signal.SIGKILL)
    os.kill(training, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "one")
    again = f"{STALE}from scale.run_in_store import *; run_stage(main)"
    command = ["-c", again, "train", "recipe.yaml", "--force", "--run", url, "--take-over"]
    code, _, err = finish(start(tmp_path / "two", *command), 300)
    assert (code, "resuming from step" in err) == (0, True), err
    assert "student/training_log.json" in store.names("student")
    assert store.names("training") == []


def test_a_local_run_imports_nothing_of_this(tmp_path: Path) -> None:
    code = "import runpy, sys\ntry: runpy.run_module('generate', run_name='__main__')\nfinally: print(*sys.modules)"
    with misbehaving() as teacher:
        place = machine(tmp_path / "one", teacher, 3)
        exit_code, out, _ = finish(start(place, "-c", code, "recipe.yaml", "--run", "run", "--quiet"))
    assert (exit_code, "generate.run" in out) == (0, True)
    assert not {name.split(".")[0] for name in out.split()} & {"scale", "obstore"}


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_logprobs_which_a_lost_machine_would_lose_are_refused(tmp_path: Path, more: list[str]) -> None:
    store = (tmp_path / "store").as_uri()
    with misbehaving() as teacher:
        one = machine(tmp_path / "one", teacher, 3, sampling={"logprobs": 2})
        code, _, err = finish(start(one, "-m", "generate", "recipe.yaml", "--run", f"{store}/stories", *more))
        assert (code, teacher.asked) == (2, [])
        assert "error: sampling.logprobs is 2, but a run in object storage" in err
        assert "use a folder for --run" in err
        code, _, err = finish(
            start(one, "-m", "generate", "recipe.yaml", "--run", f"{store}/stories", *more, "--generate.mode", "batch",
                  "--sampling.logprobs", "null")
        )  # fmt: skip
        assert (code, teacher.asked) == (2, [])
        assert "error: generate.mode is batch, but a run in object storage" in err


@pytest.mark.slow
def test_new_prompts_and_verdicts_are_bought_once(tmp_path: Path, url: str) -> None:
    """What is asked beside the prompts is in the store, too: a second machine asks nothing."""
    number = count()

    def script(asked: Asked) -> Behaviour:
        if asked.body["model"] == "judge":
            return answer('{"fit": 4, "score": 4}')
        return answer(f"<request>{next(number)} {os.urandom(20).hex()}</request>")

    with misbehaving(script) as teacher:
        judge = {"model": "judge", "rubric": {"fit": "fits"}}
        asked = []
        for name in ("one", "two"):
            place = machine(tmp_path / name, teacher, 6, filters={"judge": judge})
            for command in (["generate", "--quiet"], ["filters"], ["filters.evolve", "--rounds", "1", "--quiet"]):
                code, _, err = finish(start(place, "-m", command[0], "recipe.yaml", "--run", url, *command[1:]))
                assert code == 0, err
            asked.append(len(teacher.asked))
    assert asked == [18, 18]


def _last_lease(store: Store) -> dict[str, object]:
    names = store.names("lease")
    return dict(json.loads(store.get(names[-1]) or b"{}")) if names else {}
