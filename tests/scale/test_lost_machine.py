"""A machine that is lost with its disk, without a process of its own: what the next one finds, asks for and counts."""

import shutil
import sys
import time
from pathlib import Path

import msgspec
import pytest

from generate.budget import Account, Spend, read_account
from generate.journal import read_journal
from pipeline.errors import DataError, UsageError
from pipeline.records import Completion, Usage, encode_line
from pipeline.rundir import write_json
from scale import run_lease
from scale.collect import _answers_since
from scale.fetch import main as fetch
from scale.parts import part_name
from scale.run_in_store import cache_folder, run_in_store
from scale.run_in_store import main as run_main
from scale.run_lease import Lease, TakenOver
from scale.storage import Folder, open_store
from scale.sync import Mirror, StoreState
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


@pytest.mark.parametrize(
    "asking", ["experiments/teachers/b", "evaluation/asked-teacher/probes", "turns/1", "judge/v/1"]
)
def test_what_any_part_of_a_run_has_asked_is_in_the_store_as_it_comes(tmp_path: Path, asking: str) -> None:
    store, one, two = open_store((tmp_path / "store").as_uri()), tmp_path / "one", tmp_path / "two"
    pool, timed = one / "experiments/pool", one / "evaluation/served-teacher/probes"
    for folder in (one / asking, pool, timed, one / "cluster/w", two):
        folder.mkdir(parents=True)
    for folder in (one, one / asking, one / "cluster/w", timed):
        (folder / "completions.jsonl").write_bytes(b"".join(map(row, range(3))))
        write_json(folder / "spend.json", Account(Spend(12, 5)))
    (pool / "completions.jsonl").symlink_to(one / "completions.jsonl")
    Mirror(store, one, StoreState("one")).upload(rest=True)
    Mirror(store, two, StoreState("two")).fetch()
    assert {path.relative_to(two).as_posix() for path in two.rglob("*.json*")} == {
        *("completions.jsonl", "spend.json", f"{asking}/completions.jsonl", f"{asking}/spend.json")
    }
    assert len(read_journal(two / asking / "completions.jsonl", Completion).ids) == 3


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
    write_json(one / "spend.json", Account())
    mirror = Mirror(store, one, StoreState("one"))
    mirror.upload()  # two parts; three rows wait
    Lease.take(store, "one").beat(mirror.unstored)
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


def test_a_machine_that_comes_back_puts_its_answers_and_leaves_the_files_of_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lease, "STALE_S", 0.0)
    store, one, two = open_store((tmp_path / "store").as_uri()), tmp_path / "one", tmp_path / "two"
    mirrors = []
    for folder, step in ((one, 2), (two, 4)):
        lease = Lease.take(store, folder.name, take_over=True)
        mirrors.append(Mirror(store, folder, StoreState(folder.name), lease.check))
        checkpoint = folder / f"training/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for file in (folder / "training/fingerprint", checkpoint / "trainer_state.json", folder / "kept.jsonl"):
            file.write_text(folder.name)
        write_json(folder / "spend.json", Account(Spend(step)))
    two_s = {name: (two / name).read_bytes() for name in ("spend.json", "training/fingerprint", "kept.jsonl")}
    paused, holder = mirrors
    holder.upload(rest=True)
    holder.put_training()
    holder.push()
    (one / "completions.jsonl").write_bytes(row(1))
    paused.upload(rest=True)
    for change in (paused.put_training, paused.push, paused.compact):
        with pytest.raises(TakenOver):
            change()
    assert {name: store.get(name) for name in two_s} == two_s
    assert store.names("training") == ["training/checkpoint-4/trainer_state.json", "training/fingerprint"]
    assert store.names("parts") == [part_name("completions", "one", 0)]


@pytest.mark.parametrize("damaged", [b"{", b'{"owner": "\xff"}'], ids=["cut off", "no UTF-8"])
def test_a_damaged_state_of_a_folder_is_one_clear_line(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / ".stored.json").write_bytes(damaged)
    with pytest.raises(DataError, match=r"\.stored\.json: .*; move it away, and run the same command with --take-over"):
        StoreState.read(tmp_path)


def test_a_blank_line_in_a_journal_is_no_row(tmp_path: Path) -> None:
    folder, url = tmp_path / "one", (tmp_path / "store").as_uri()
    folder.mkdir()
    journal, rows = folder / "completions.jsonl", row(1) + row(2)
    journal.write_bytes(row(1) + b"\n" + row(2))
    assert len(_answers_since(journal, 0)) == 2
    assert run_in_store([sys.executable, "-c", "pass"], url, folder) == 0
    open_store(url).put("completions.jsonl", row(1) + b"\n" + row(2))  # as a user may have edited it
    journal.write_bytes(row(1) + b"\n" + row(2))
    assert run_in_store([sys.executable, "-c", "pass"], url, folder) == 0
    assert len(read_journal(journal, Completion).ids) == 2
    assert rows.splitlines() == [line for line in journal.read_bytes().splitlines() if line]


def test_a_store_has_the_last_whole_checkpoint_while_a_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scale.run_lease.TICK_S", 0.1)
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


def lost_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Folder]:
    """A folder whose command has lost its lease while the store was away, and the store, which another has."""
    monkeypatch.setattr(run_lease, "STALE_S", 0.0)
    folder, store = tmp_path / "one", Folder(tmp_path / "store")
    folder.mkdir()
    lease = Lease.take(store, "one")
    StoreState("one", url=store.url, lease=lease.name).save(folder)
    Lease.take(store, "two", take_over=True).release()
    return folder, store


def test_a_machine_says_that_it_is_alive_until_all_is_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching a file and putting another take longer than a holder may be silent."""
    monkeypatch.setattr("scale.run_in_store.BEAT_S", 0.02)
    store, folder, beats = Folder(tmp_path / "store"), tmp_path / "one", list[str]()
    store.put("given", b"")
    folder.mkdir()
    put, get = Folder.put, Folder.download

    def slow(what: str) -> None:
        seen, end = store.get("lease/000001.json"), time.monotonic() + 10
        while store.get("lease/000001.json") == seen and time.monotonic() < end:
            time.sleep(0.01)
        beats.extend([what] * (store.get("lease/000001.json") != seen))

    def slow_put(self: Folder, name: str, data: bytes | Path) -> None:
        if name == "made":
            slow("put")
        put(self, name, data)

    monkeypatch.setattr(Folder, "download", lambda *given: (slow("fetch"), get(*given))[1])
    monkeypatch.setattr(Folder, "put", slow_put)
    command = [sys.executable, "-c", f"open({str(folder / 'made')!r}, 'w')"]
    assert run_in_store(command, store.url, folder) == 0
    assert beats == ["fetch", "put"]
    assert msgspec.json.decode(store.get("lease/000001.json") or b"")["released"]


def test_a_machine_that_was_taken_over_puts_answers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one takes the run between two of its puts, or before them."""
    monkeypatch.setattr(run_lease, "STALE_S", 0.0)
    monkeypatch.setattr("scale.run_in_store.BEAT_S", 1000.0)
    put = Folder.put

    def losing(self: Folder, name: str, data: bytes | Path) -> None:
        put(self, name, data)
        if name == "a":
            Lease.take(store, "two", take_over=True)
            put(self, "b", b"of the second")

    monkeypatch.setattr(Folder, "put", losing)
    store, folder = Folder(tmp_path / "store"), tmp_path / "one"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("of the first")
    with pytest.raises(TakenOver):
        run_in_store([sys.executable, "-c", "pass"], store.url, folder)
    assert (store.get("a"), store.get("b")) == (b"of the first", b"of the second")

    store, folder = Folder(tmp_path / "other"), tmp_path / "three"
    folder.mkdir()
    put(store, "spend.json", b"{}")
    (folder / "new").write_bytes(row(1))
    code = f"""if True:
        from pathlib import Path
        from scale.run_lease import Lease, STALE_S
        import scale.run_lease
        from scale.storage import Folder
        scale.run_lease.STALE_S = 0.0
        folder, store = Path({str(folder)!r}), Folder(Path({store.url!r}))
        Lease.take(store, "two", take_over=True)
        (folder / "new").rename(folder / "completions.jsonl")
        (folder / "spend.json").write_text('{{"unsaid": {{}}}}')
    """
    monkeypatch.setattr("scale.run_lease.TICK_S", 1000.0)
    with pytest.raises(TakenOver):
        run_in_store([sys.executable, "-c", code], store.url, folder)
    assert (len(store.names("parts")), store.get("spend.json")) == (1, b"{}")


def test_a_student_is_never_mixed_of_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, store = lost_lease(tmp_path, monkeypatch)
    for name in ("student/adapter_config.json", "student/lineage.json", "judgements.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the first")
    for name in ("student/config.json", "student/lineage.json"):
        store.put(name, b"of the second")
    assert run_in_store([sys.executable, "-c", "pass"], store.url, folder) == 0
    assert store.names("student") == ["student/config.json", "student/lineage.json"]
    assert store.get("student/lineage.json") == b"of the second"
    assert store.get("judgements.jsonl") == b"of the first"  # nobody else has made it, and it was paid for


def test_a_student_is_fetched_before_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a new machine, on one with an older copy, and not in place of what only this machine has."""
    monkeypatch.chdir(tmp_path)
    url, store = (tmp_path / "store").as_uri(), Folder(tmp_path / "store")
    served = []

    def shown(command: list[str]) -> int:
        folder = Path(command[-1]) / "student"
        served.append({path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {})
        return 0

    def serve(*flags: str) -> dict[str, str]:
        monkeypatch.setattr("scale.run_in_store.run_child", shown)
        with pytest.raises(SystemExit):
            run_main(["serve", "recipe.yaml", "--run", url, *flags, "--print"])
        return served[-1]

    folder = cache_folder(url) / "student"
    folder.mkdir(parents=True)
    (folder / "own").write_text("put nowhere")
    Lease.take(store, "other").release()
    assert serve("--model", "student") == {"own": "put nowhere"}
    shutil.rmtree(folder)
    store.put("student/model", b"old")
    assert serve() == {}  # the teacher needs no file of the run
    assert serve("--model", "student") == {"model": "old"}
    store.delete("student/model")
    store.put("student/adapter", b"new")
    assert serve("--model=before") == {"adapter": "new"}

    folder = cache_folder(url)
    state = StoreState.read(folder)
    state.lease = Lease.take(store, state.owner).name
    state.save(folder)
    (folder / "student" / "adapter").write_text("not in the store yet")
    assert serve("--model", "student") == {"adapter": "not in the store yet"}


def test_a_killed_server_ends_with_the_code_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scale.run_in_store.run_child", lambda command: -9)
    with pytest.raises(SystemExit, match="137"):
        run_main(["serve", "recipe.yaml", "--run", (tmp_path / "store").as_uri()])


def test_a_fetched_copy_is_of_one_run_and_has_what_the_run_has(tmp_path: Path) -> None:
    one, other = Folder(tmp_path / "a" / "t"), Folder(tmp_path / "b" / "t")
    for name in ("completions.jsonl", "student/adapter_config.json", "preferences.jsonl"):
        one.put(name, row(1) if name == "completions.jsonl" else b"old")
    other.put("completions.jsonl", row(2))
    fetch([one.url, str(tmp_path / "home")])
    for name in ("student/adapter_config.json", "preferences.jsonl"):
        one.delete(name)
    one.put("student/config.json", b"new")
    (tmp_path / "home" / "own").write_text("the user's")
    fetch([one.url, str(tmp_path / "home")])
    files = {path.relative_to(tmp_path / "home").as_posix() for path in (tmp_path / "home").rglob("[!.]*")}
    assert files == {"completions.jsonl", "own", "student", "student/config.json"}
    with pytest.raises(UsageError, match=r"home: was fetched from .*a/t; name another folder after the URL"):
        fetch([other.url, str(tmp_path / "home")])
    assert (tmp_path / "home" / "completions.jsonl").read_bytes() == row(1)


def test_what_makes_a_student_whole_is_put_last(tmp_path: Path) -> None:
    """Else a leading process that is killed while it puts one would leave a student that seems to be trained."""
    folder, put = tmp_path / "one", list[str]()

    class Recording(Folder):
        def put(self, name: str, data: bytes | Path) -> None:
            put.append(name)

    for name in ("lineage.json", "student/lineage.json", "student/model.safetensors", "test.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    Mirror(Recording(tmp_path), folder, StoreState("one")).push()
    assert put == ["student/model.safetensors", "test.jsonl", "lineage.json", "student/lineage.json"]
