"""What a launcher may be told, and what is refused with one line; the trainings themselves are in test_train.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from tests.tiny_student import make_recipe
from train.processes import REFUSED, Processes, launched


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_training_cannot_do_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched().check(make_recipe("student").train)
    monkeypatch.setenv(name, "true")
    with pytest.raises(UsageError, match=f"{name} is set, but .*; use accelerate launch --use_fsdp, or --multi_gpu"):
        launched().check(make_recipe("student").train)


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ("lora", False),
        ("full", False),
        ("kd", False),
        ("qlora", True),
        ("gold", True),
        ("on_policy", True),
        ("dpo", True),
    ],
)
def test_methods_that_cannot_be_sharded_are_refused(method: str, refused: bool) -> None:
    config = make_recipe("student", method=method).train
    Processes(rank=1, count=2).check(config)
    if refused:
        with pytest.raises(UsageError, match=f"train.method {method} cannot be sharded .*; use .*--multi_gpu"):
            Processes(rank=1, count=2, sharded=True).check(config)
    else:
        Processes(rank=1, count=2, sharded=True).check(config)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Processes()),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Processes(rank=1, count=4)),
        ({"RANK": "1", "WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}, Processes(rank=1, count=4, sharded=True)),
        ({"ACCELERATE_USE_FSDP": "true"}, Processes()),  # nobody to share with
        (
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "DISTILLATE_OWN_FOLDER": "true"},
            Processes(rank=2, count=4, local_rank=0),
        ),
    ],
)
def test_a_process_is_what_the_launcher_says(
    environment: dict[str, str], expected: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "DISTILLATE_OWN_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert launched() == expected
    assert launched().shards == (4 if expected.sharded else 1)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"  # to ask changes nothing


@pytest.mark.parametrize(
    ("rank", "local_rank", "leads"), [(0, None, True), (2, None, False), (2, 0, True), (3, 1, False)]
)
def test_one_process_leads_in_each_folder(rank: int, local_rank: int | None, leads: bool) -> None:
    assert Processes(rank, 4, local_rank=local_rank).lead_in_folder == leads


def test_trained_weights_are_shared_if_folders_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model, shared = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 3)), list[Any]()
    model[0].requires_grad_(False)
    monkeypatch.setattr("accelerate.utils.broadcast", shared.extend)
    Processes(0, 2).share_weights(model)
    assert shared == []
    Processes(0, 2, local_rank=0).share_weights(model)
    assert [weights.data_ptr() for weights in shared] == [weights.data_ptr() for weights in model[1].parameters()]


LEAVING = """
import atexit, os, sys, time
from pathlib import Path
import torch
from train.processes import launched

def end(code):
    assert Path(sys.argv[1]).exists() and not torch.distributed.is_initialized()
    now(code)

class Late:
    def __del__(self, abort=os.abort):
        abort()

now, os._exit, late = os._exit, end, Late()
atexit.register(lambda: print(launched().rank, "is done"))
with launched().lead_first():
    pass
if not launched().lead:
    time.sleep(1)
    Path(sys.argv[1]).touch()
launched().leave()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_process_ends_before_the_others(tmp_path: Path) -> None:
    """Each ends without Python's own end, in which threads of gloo can crash, but with what is registered for it."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", str(tmp_path / "leaving.py"), str(tmp_path / "late")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == ["0 is done", "1 is done"]
