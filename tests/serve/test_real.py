"""Serving with the real vLLM and the embedded model: it answers, and nothing is left of it. Slow."""

import json
import os
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import psutil
import pytest

from pipeline.errors import DistillError, UsageError
from pipeline.models import resolve_model
from pipeline.serve_config import ServeConfig
from serve.server import free_port, serving
from tests.servers.serve_process import command_of, read_until, start, wait_until

EMBEDDED = "embedded:smollm2-135m"
MIB = 1 << 20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Teacher(NamedTuple):
    """`python -m serve` with the embedded model, ready."""

    process: "subprocess.Popen[str]"
    url: str
    said: str  # so far


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    """One for all tests; the last of them interrupts it."""
    process = start(tmp_path_factory.mktemp("teacher"), EMBEDDED, "--serve.kv_cache_gib", "1")
    try:
        said = read_until(process, "Ctrl-C")
        yield Teacher(process, said.split(f" serves {EMBEDDED}")[0].rsplit(" ", 1)[1], said)
    finally:
        process.kill()
        process.wait()


def ask(teacher: Teacher, **body: object) -> dict:
    request = urllib.request.Request(
        f"{teacher.url}/chat/completions",
        json.dumps({"model": EMBEDDED, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as answer:
        return json.loads(answer.read())


def tree(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_the_embedded_teacher_answers(teacher):
    answer = ask(
        teacher,
        messages=[{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}],
        temperature=0,
        max_tokens=32,
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["model"] == EMBEDDED


def test_seeded_prompts_longer_together_than_a_step_do_not_end_the_engine(teacher):
    """In chunks, as vLLM prefills by default, they do on a CPU: "CPU Generator does not use offset"."""
    question = "Tell a story about a rabbit, a bear, a cat and a mouse who look for the moon. " * 4  # 80 tokens or so

    def answer(seed: int) -> str:
        asked = ask(teacher, messages=[{"role": "user", "content": question}], seed=seed, max_tokens=4)
        return asked["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(answer, range(64)))
    assert len(set(answers)) > 1 and answer(0) == answers[0]


def test_interrupted_in_its_process_group_it_leaves_nothing(teacher):
    process = teacher.process
    processes = tree(process)
    assert any("EngineCore" in command_of(child) for child in processes)
    os.killpg(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, teacher.said + rest
    assert [child for child in processes if child.is_running()] == []


def test_killed_outright_while_its_engine_loads_it_leaves_nothing(tmp_path):
    process = start(tmp_path, EMBEDDED)
    wait_until(lambda: any("EngineCore" in command_of(child) for child in tree(process)), every_s=0.5)
    processes = tree(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_until(lambda: not any(child.is_running() for child in processes))


def test_a_flag_that_vllm_does_not_know_is_named(tmp_path):
    settings = ServeConfig(args=["--bogus-flag"])
    with (
        pytest.raises(UsageError, match=r"unrecognized arguments: --bogus-flag") as error,
        serving(EMBEDDED, port=free_port(), config=settings, log=tmp_path / "log"),
    ):
        pytest.fail("vLLM took the flag")
    assert "\n" not in str(error.value)


def test_weights_that_are_cut_short_are_the_cause_shown(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(resolve_model(EMBEDDED), broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(MIB)
    with (
        pytest.raises(DistillError, match=r"SafetensorError: .*; its log: ") as error,
        serving(str(broken), port=free_port(), config=ServeConfig(), log=tmp_path / "log"),
    ):
        pytest.fail("vLLM loaded broken weights")
    assert "\n" not in str(error.value)
