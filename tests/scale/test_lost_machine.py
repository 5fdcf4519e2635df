"""A machine that is lost with its disk, without a process of its own: what the next one finds, asks for and counts."""

import shutil
import sys
from pathlib import Path

import pytest

from generate.budget import Account, Spend, read_account, write_account
from generate.journal import read_journal
from pipeline.records import Completion, Usage, encode_line
from scale import run_lease
from scale.run_in_store import run_in_store
from scale.run_lease import Lease
from scale.storage import Folder, open_store
from scale.sync import Mirror, State
from tests.completion_fields import completion_fields

# Writes checkpoints, and goes on when the store, a folder here, has them.
LEARN = """if True:
    import shutil, sys, time
    from pathlib import Path
    folder, store = Path(sys.argv[1]) / "training", Path(sys.argv[2]) / "training"
    end = time.monotonic() + 60
    for step in (2, 4):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / "fingerprint").touch()
        (folder / f"checkpoint-{step}/model").touch()
        (folder / f"checkpoint-{step}/trainer_state.json").touch()
        shutil.rmtree(folder / f"checkpoint-{step - 2}", ignore_errors=True)
        while [path.parent.name for path in store.glob("*/trainer_state.json")] != [f"checkpoint-{step}"]:
            assert time.monotonic() < end, "no checkpoint in the store"
            time.sleep(0.05)
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6/model").touch()
    time.sleep(0.5)
    print(*(path.relative_to(store) for path in sorted(store.rglob("*")) if path.is_file()))
"""

# What nodes do in a store, a folder here, without the folder of the run.
TRAIN = """if True:
    import shutil, sys
    from pathlib import Path
    store, step = Path(sys.argv[1]), sys.argv[2]
    assert (store / "kept.jsonl").exists(), "what was only here was not put first"
    shutil.rmtree(store / "training", ignore_errors=True)
    if step != "end":
        (store / f"training/checkpoint-{step}").mkdir(parents=True)
        (store / "training/fingerprint").write_text(step)
        (store / f"training/checkpoint-{step}/trainer_state.json").touch()
        sys.exit(3)
    (store / "student/old").unlink()
    (store / "student/new").touch()
    (store / "lineage.json").write_text("trained")
"""

pytestmark = pytest.mark.timeout(400)  # they start nodes and commands, which takes long on a busy machine


def row(number: int) -> bytes:
    usage = Usage(prompt_tokens=7, completion_tokens=5)
    return encode_line(Completion(**completion_fields(f"id{number:02}", "ok", usage=usage)))


def test_rows_that_were_not_stored_are_left_to_ask_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scale.parts.ROWS", 5)
    monkeypatch.setattr(run_lease, "STALE_S", 0.0)
    url, one, two = (tmp_path / "store").as_uri(), tmp_path / "one", tmp_path / "two"
    store = open_store(url)
    for folder in (one, two):
        folder.mkdir()
    (one / "completions.jsonl").write_bytes(b"".join(map(row, range(13))))
    write_account(one / "spend.json", Account())
    rows = Mirror(store, one, State("one")).upload()  # two parts; three rows wait
    Lease.take(store, "one").beat(rows)
    shutil.rmtree(one)

    journal = two / "completions.jsonl"
    (two / "more").write_bytes(b"".join(map(row, (12, 11, 10))))  # what the stage is answered now
    script = "import sys; open(sys.argv[1], 'ab').write(open(sys.argv[2], 'rb').read())"
    command = [sys.executable, "-c", script, str(journal), str(two / "more")]
    assert run_in_store(command, url, two, take_over=True) == 0
    assert (
        "up to 13 answers of the lost machine are asked again; the budget counts 156 tokens" in capsys.readouterr().err
    )
    assert read_account(two / "spend.json").unsaid == Spend(tokens=13 * 12)
    assert journal.read_bytes() == store.get("completions.jsonl") == b"".join(map(row, range(13)))
    assert len(read_journal(journal, Completion).ids) == 13
    assert (store.names("parts"), store.get("spend.json")) == ([], (two / "spend.json").read_bytes())


def test_a_store_has_the_last_whole_checkpoint_while_a_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scale.run_in_store.TICK_S", 0.1)
    folder, store = tmp_path / "one", tmp_path / "store"
    folder.mkdir()
    assert run_in_store([sys.executable, "-c", LEARN, str(folder), str(store)], store.as_uri(), folder) == 0
    assert capfd.readouterr().out.split() == ["checkpoint-4/model", "checkpoint-4/trainer_state.json", "fingerprint"]


def test_what_nodes_have_trained_comes_here_and_stays_in_the_store(tmp_path: Path) -> None:
    folder, store, url = tmp_path / "one", tmp_path / "store", (tmp_path / "store").as_uri()
    for name in ("kept.jsonl", "student/old", "training/checkpoint-9/trainer_state.json", "training/fingerprint"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("here")

    def files(place: Path) -> dict[str, str]:
        paths = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
        return {
            str(path): (place / path).read_text() for path in paths if path.name[0] != "." and "lease" not in path.parts
        }

    before = files(folder)
    for step in ("5", "end"):
        code = run_in_store([sys.executable, "-c", TRAIN, str(store), step], url, folder, by_nodes=True)
        assert code == (0 if step == "end" else 3)
        if step == "5":  # it failed: what is here is older until the next command
            assert files(folder) == before
        else:
            assert files(folder) == files(store)
            assert files(store) == {"kept.jsonl": "here", "student/new": "", "lineage.json": "trained"}
        after = files(store)
        assert run_in_store([sys.executable, "-c", "pass"], url, folder) == 0
        assert files(folder) == files(store) == after


def test_what_makes_a_student_whole_is_put_last(tmp_path: Path) -> None:
    """Else a leading process that is killed while it puts one would leave a student that seems to be trained."""
    folder, put = tmp_path / "one", list[str]()

    class Recording(Folder):
        def put(self, name: str, data: bytes | Path) -> None:
            put.append(name)

    for name in ("lineage.json", "student/lineage.json", "student/model.safetensors", "test.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    Mirror(Recording(tmp_path), folder, State("one")).push()
    assert put == ["student/model.safetensors", "test.jsonl", "lineage.json", "student/lineage.json"]
