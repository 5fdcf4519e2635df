"""What a fetch brings while the run goes on elsewhere, and what it leaves away: in a folder and in S3 (moto)."""

import errno
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import msgspec
import pytest

from pipeline.errors import DistillError, UsageError
from pipeline.records import Completion, encode_line
from pipeline.rundir import LOCK
from scale.fetch import main as fetch
from scale.run_in_store import fetch_student, run_in_store
from scale.storage import Folder, Store
from scale.sync import Mirror, StoreState
from tests.completion_fields import completion_fields


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def row(number: int) -> bytes:
    return encode_line(Completion(**completion_fields(f"id{number:02}", "ok")))


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(row(1) if name.endswith("completions.jsonl") else name.encode())


def files(folder: Path) -> dict[str, bytes]:
    """The files of a run, without those that are a folder's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, store: Store, call: str, name: str, happens: Callable[[], None], skipped: int = 0
) -> None:
    """Before a store is first asked, by this call, for an object whose name begins so; with `skipped` a later time."""
    asked, calls = getattr(type(store), call), list[str]()

    def ask(self: Store, wanted: str, *given: Path) -> object:
        if wanted.startswith(name):
            calls.append(wanted)
            if len(calls) == skipped + 1:
                happens()
        return asked(self, wanted, *given)

    monkeypatch.setattr(type(store), call, ask)


@pytest.mark.parametrize("earlier", [0, 4], ids=["first", "a later compaction"])
def test_parts_that_are_compacted_during_a_fetch_come_with_all_their_rows(
    store: Store, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, earlier: int
) -> None:
    rows = [row(number) for number in range(10)]
    if earlier:
        store.put("completions.jsonl", b"".join(rows[:earlier]))
    write(tmp_path / "one", "recipe.yaml")
    running = Mirror(store, tmp_path / "one", StoreState("one"))
    running.fetch()
    with (tmp_path / "one" / "completions.jsonl").open("ab") as journal:
        journal.writelines(rows[earlier:])
    running.upload(rest=True)
    assert running.unstored == {"completions": 10 - earlier}
    meanwhile(monkeypatch, store, "get", "parts/completions/one-", running.compact)
    fetch([store.url, str(home)])
    assert store.names() == ["completions.jsonl"]  # it was compacted
    assert (home / "completions.jsonl").read_bytes() == store.get("completions.jsonl") == b"".join(rows)


@pytest.mark.parametrize("moment", ["lineage.json", "training/checkpoint-10/trainer_state.json"])
def test_a_checkpoint_that_is_replaced_during_a_fetch_comes_as_the_newer_one(
    store: Store, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The training goes on before the fetch has any of the old checkpoint, or when it has a part of it."""
    one = tmp_path / "one"
    running = Mirror(store, one, StoreState("one"))
    write(one, "kept.jsonl", "lineage.json", "training/fingerprint", "validation.jsonl", "completions.jsonl")
    running.upload(rest=True)
    running.push()

    def save(step: int) -> None:
        shutil.rmtree(one / f"training/checkpoint-{step - 10}", ignore_errors=True)
        write(one, *(f"training/checkpoint-{step}/{name}" for name in ("model.safetensors", "trainer_state.json")))
        running.put_training()

    save(10)
    meanwhile(monkeypatch, store, "download", moment, lambda: save(20))
    fetch([store.url, str(home)])
    kept = {f"training/{name}" for name in ("checkpoint-20/model.safetensors", "checkpoint-20/trainer_state.json")}
    assert {*store.names("training")} == {*kept, "training/fingerprint"}
    assert files(home) == files(one)


def test_no_checkpoint_is_removed_from_the_store_before_the_newer_ones_are_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training puts checkpoint 30 in place of 10, the best so far, between two looks at its folder."""
    one, rglob = tmp_path / "one", Path.rglob
    running = Mirror(store, one, StoreState("one"))

    def save(step: int) -> None:
        write(one, *(f"training/checkpoint-{step}/{name}" for name in ("model.safetensors", "trainer_state.json")))

    def replaced(folder: Path, pattern: str) -> Iterator[Path]:
        if folder.name == "checkpoint-10":
            save(30)
            shutil.rmtree(folder)
        return rglob(folder, pattern)

    def stored() -> set[str]:
        return {name.split("/")[1] for name in store.names("training") if name.endswith("trainer_state.json")}

    write(one, "training/fingerprint")
    save(10)
    save(20)
    running.put_training()
    monkeypatch.setattr(Path, "rglob", replaced)
    running.put_training()
    assert stored() == {"checkpoint-10", "checkpoint-20"}
    running.put_training()
    assert stored() == {"checkpoint-20", "checkpoint-30"}


CHECKPOINT = ("model.safetensors", "trainer_state.json")


@pytest.mark.parametrize("run", ["", "experiments/seeds/seed-0/"], ids=["run", "arm"])
def test_the_last_checkpoint_leaves_the_store_when_the_student_is_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """And nothing of the older student is beside the new one."""
    one, put, seen = tmp_path / "one", type(store).put, list[set[str]]()
    student, work = one / run / "student", one / run / "training"
    running = Mirror(store, one, StoreState("one"))
    write(one, *(f"{run}{name}" for name in ("kept.jsonl", "student/adapter_config.json", "student/lineage.json")))
    running.push()
    write(work, "fingerprint", *(f"checkpoint-2/{name}" for name in CHECKPOINT))
    running.put_training()

    def watched(self: Store, name: str, data: bytes | Path) -> None:
        put(self, name, data)
        seen.append({name.removeprefix(run) for name in store.names() if "student/" in name or "training/" in name})

    shutil.rmtree(student)
    write(one, *(f"{run}student/{name}" for name in ("model.safetensors", "lineage.json")))
    work.rename(one / "gone")
    monkeypatch.setattr(type(store), "put", watched)
    running.put_training()
    checkpoint = {"training/fingerprint", *(f"training/checkpoint-2/{name}" for name in CHECKPOINT)}
    model = {"student/model.safetensors"}
    assert seen == [checkpoint | model, checkpoint | model | {"student/lineage.json"}]
    assert {name for name in store.names() if "student/" in name or "training/" in name} == {
        f"{run}student/{name}" for name in ("model.safetensors", "lineage.json")
    }


def test_checkpoints_of_another_training_are_never_mixed_with_older_ones(store: Store, tmp_path: Path) -> None:
    one = tmp_path / "one"
    running, work = Mirror(store, one, StoreState("one")), one / "training"
    write(work, "fingerprint", *(f"checkpoint-2/{name}" for name in CHECKPOINT))
    running.put_training()
    older = store.names()
    shutil.rmtree(work)
    write(work, "fingerprint", "checkpoint-2/model.safetensors")  # begun anew, with other settings
    (work / "fingerprint").write_text("another")
    running.put_training()
    assert store.names() == older
    assert store.get("training/fingerprint") == b"fingerprint"
    write(work, "checkpoint-4/adapter.safetensors", "checkpoint-4/trainer_state.json")
    running.put_training()
    assert store.names("training") == [
        *("training/checkpoint-4/adapter.safetensors", "training/checkpoint-4/trainer_state.json"),
        "training/fingerprint",
    ]
    assert store.get("training/fingerprint") == b"another"


@pytest.mark.parametrize("ends", ["ended", "replaced"])
def test_a_training_that_goes_on_meanwhile_leaves_nothing_torn_in_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """It ends while its checkpoints are looked through; the next one replaces its student while that is put."""
    one = tmp_path / "one"
    running, work = Mirror(store, one, StoreState("one")), one / "training"
    write(work, "fingerprint", *(f"checkpoint-2/{name}" for name in CHECKPOINT))
    running.put_training()
    checkpoint = store.names("training")
    if ends == "ended":
        (work / "fingerprint").unlink()
        (work / "checkpoint-2/model.safetensors").unlink()
        running.put_training()
        assert store.names("training") == checkpoint
        return
    shutil.rmtree(work)
    write(one, "student/a", "student/lineage.json")

    def replace() -> None:
        (one / "student").rename(one / "student-sft")
        write(one, "student/a", "student/b", "student/lineage.json")

    meanwhile(monkeypatch, store, "put", "student/a", replace)
    running.put_training()
    assert store.names() == sorted([*checkpoint, "student/a"])
    running.put_training()
    of_both = ("student-sft/a", "student-sft/lineage.json", "student/a", "student/b", "student/lineage.json")
    assert store.names() == sorted(of_both)


@pytest.mark.parametrize("more", [(), ("student/model-2",)], ids=["same names", "more files"])
def test_a_student_that_is_replaced_while_it_is_fetched_is_never_of_two(
    store: Store, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    one = tmp_path / "one"
    running, number = Mirror(store, one, StoreState("one")), count()
    names = ("student/adapter", "student/lineage.json", "lineage.json")
    write(one, *names)
    running.push()

    def train() -> None:
        shutil.rmtree(one / "student")
        write(one, *names, *more)
        for name in names:
            (one / name).write_text(f"new {next(number)}")
        running.push()

    with monkeypatch.context() as patch:
        meanwhile(patch, store, "download", "student/lineage.json", train)
        fetch([store.url, str(home)])
    assert files(home) == files(one)
    meanwhile(monkeypatch, store, "download", "student/lineage.json", train)
    with pytest.raises(DistillError, match="student: was replaced just now; run the same command again"):
        Mirror(store, tmp_path / "served", StoreState("served")).fetch_student()


def test_what_the_user_may_remove_stays_removed_and_all_else_comes_back(
    store: Store, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    removed = ["training/checkpoint-5/trainer_state.json", "training/fingerprint", "reviews.jsonl"]
    answers, stays = ["completions.jsonl", "judge/a/b/completions.jsonl"], "review_sample.json"
    write(home, stays, *removed, *answers, "kept.jsonl", "report.html.tmp")  # the last one is half written
    assert run_in_store([sys.executable, "-c", "pass"], store.url, home) == 0
    assert {*removed, *answers, "kept.jsonl"} < {*store.names()} and "report.html.tmp" not in store.names()
    store.put(by_hand := "judgements.jsonl", b"put there by hand")  # it was never here, so nobody has removed it
    shutil.rmtree(home / "training")
    for name in ("reviews.jsonl", "kept.jsonl", "report.html.tmp", *answers):
        (home / name).unlink()
    look = (
        f"from pathlib import Path; home = Path({str(home)!r}); "
        "print(*sorted(path.relative_to(home) for path in home.rglob('[!.]*') if path.is_file()))"
    )
    assert run_in_store([sys.executable, "-c", look], store.url, home) == 0
    left = sorted([*answers, by_hand, stays, "kept.jsonl"])
    said = capfd.readouterr()
    assert said.out.split() == left  # what the stage sees
    told = {line.partition(":")[0] for line in said.err.splitlines() if "was removed here" in line}
    assert told == {"training", "reviews.jsonl"}
    assert [name for name in store.names() if not name.startswith("lease/")] == left
    assert [store.get(name) for name in answers] == [row(1), row(1)]


@pytest.mark.parametrize("by_nodes", [False, True], ids=["here", "by nodes"])
@pytest.mark.parametrize("stopped", ["put_new lease", "download"], ids=["as it begins", "while it fetches"])
def test_what_only_this_machine_has_outlives_a_command_that_is_stopped_before_its_stage(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str, by_nodes: bool
) -> None:
    """Unless nodes have trained meanwhile: then the store's files are the newer ones."""
    home, student, (call, _, name) = tmp_path / "home", "student/model", stopped.partition(" ")
    write(home, student, "report/report.json")

    def away(*given: object) -> None:
        raise DistillError("the store is away")

    def run(code: str = "pass", *, stop: str = "", begins: str = "", by_nodes: bool = False) -> None:
        with monkeypatch.context() as patch, suppress(DistillError):
            if stop:
                meanwhile(patch, store, stop, begins, away, skipped=stop == "put_new")
            assert run_in_store([sys.executable, "-c", code], store.url, home, by_nodes=by_nodes) in (0, 3)

    run()
    begun = f"from pathlib import Path; (Path({str(home)!r}) / {student!r}).write_text('newer')"
    run(begun, stop="put", begins=student)
    shutil.rmtree(home / "report")  # so there is something to fetch
    run(stop=call, begins=name, by_nodes=by_nodes)
    fetch_student(store.url, home)
    assert (store.get(student), (home / student).read_bytes()) == (student.encode(), b"newer")
    run()
    assert (store.get(student), (home / student).read_bytes()) == (b"newer", b"newer")

    run("raise SystemExit(3)", by_nodes=True)
    store.put(student, b"of the nodes")
    run(stop=call, begins=name)
    run()
    assert (store.get(student), (home / student).read_bytes()) == (b"of the nodes", b"of the nodes")


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ([], []),
        (["spend.json", "reviews.jsonl", "judge/verdicts.json"], ["judge/verdicts.json", "spend.json"]),
        (["gone.json"], []),  # the store has it no longer
        (["student/adapter"], ["lineage.json", "student"]),
        (["lineage.json"], ["lineage.json", "student"]),
        (["student/made here"], ["lineage.json", "student"]),
    ],
    ids=["nothing", "files", "a removed file", "a student", "a lineage", "beside a student"],
)
def test_what_was_changed_in_a_copy_stays_and_is_named(
    store: Store, home: Path, capsys: pytest.CaptureFixture[str], changed: list[str], left: list[str]
) -> None:
    names = {
        "judge/verdicts.json",
        "kept.jsonl",
        "lineage.json",
        "spend.json",
        "student/adapter",
        "student/lineage.json",
    }
    for name in {*names, "gone.json"}:
        store.put(name, b"old")
    store.put("completions.jsonl", row(2) + row(1))
    fetch([store.url, str(home)])
    for name in changed:
        (home / name).write_bytes(b"changed here")
    with (home / "completions.jsonl").open("ab") as journal:
        journal.write(row(3))
    for name in names:
        store.put(name, b"new")
    for name in ("gone.json", "student/lineage.json"):
        store.delete(name)
    capsys.readouterr()
    for _ in range(2):
        fetch([store.url, str(home)])
        said = (
            f"{home}: was changed here, so it stays as it is: {', '.join(left)}; to have what {store.url} has, remove"
        )
        err = capsys.readouterr().err
        assert err.startswith(said) if left else not err
    stored, found = dict.fromkeys(names - {"student/lineage.json"}, b"new"), files(home)
    assert found.pop("completions.jsonl") == row(1) + row(2) + row(3)
    kept = dict.fromkeys(["lineage.json", "student/adapter", "student/lineage.json"] * ("student" in left), b"old")
    assert found == stored | kept | dict.fromkeys(changed, b"changed here")
    for name in left:
        shutil.rmtree(home / name) if name == "student" else (home / name).unlink()
    fetch([store.url, str(home)])
    assert not capsys.readouterr().err
    assert stored.items() <= files(home).items()


def test_a_fetch_that_could_bring_nothing_goes_on(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Folder(tmp_path / "store")
    store.put("kept.jsonl", b"all")

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StoreState, "save", full)
        with pytest.raises(OSError, match="No space left"):
            fetch([store.url, str(home)])
    fetch([store.url, str(home)])
    assert files(home) == {"kept.jsonl": b"all"}


def test_what_a_killed_fetch_has_brought_is_not_taken_for_the_users(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Folder(tmp_path / "store")
    for name in (names := ["kept.jsonl", "reviews.jsonl", "student/a", "student/b"]):
        store.put(name, b"first")
    fetch([store.url, str(home)])
    (home / "reviews.jsonl").write_bytes(b"changed here")
    for name in names:
        store.put(name, b"second")
    killed = """if True:
        import os, sys
        from scale.fetch import main
        from scale.storage import Folder
        real = Folder.download
        Folder.download = lambda *given: os._exit(9) if given[1] == "student/b" else real(*given)
        main(sys.argv[1:])
    """
    process = subprocess.run([sys.executable, "-c", killed, store.url, str(home)], check=False)
    assert (process.returncode, files(home)["student/a"], files(home)["student/b"]) == (9, b"second", b"first")
    for name in names:
        store.put(name, b"third")
    capsys.readouterr()
    fetch([store.url, str(home)])
    assert "stays as it is: reviews.jsonl; to have" in capsys.readouterr().err
    assert files(home) == dict.fromkeys(names, b"third") | {"reviews.jsonl": b"changed here"}


@pytest.mark.parametrize("killed", [False, True], ids=["store away", "killed before its state was saved"])
def test_what_a_stage_has_removed_stays_removed_after_a_push_that_failed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """An adapter, and a whole model that is trained in its place; preferences that new filters do not want."""
    one, put, mark = tmp_path / "one", type(store).put, "student/lineage.json"

    def work(code: str) -> int:
        code = f"import os; from pathlib import Path; os.chdir({str(one)!r})\n{code}"
        return run_in_store([sys.executable, "-c", code], store.url, one)

    def away(self: Store, name: str, data: bytes | Path) -> None:
        if name == mark:
            raise DistillError("the store is away")
        put(self, name, data)

    old, new = ("preferences.jsonl", "student/adapter_model.safetensors"), ("student/model.safetensors",)
    write(one, *old, mark, "kept.jsonl")
    assert work("pass") == 0
    state = (one / ".stored.json").read_bytes()
    monkeypatch.setattr(type(store), "put", away)
    with pytest.raises(DistillError, match="the store is away"):
        work(f"[os.remove(name) for name in {old}]; [Path(name).touch() for name in {(*new, mark)}]")
    monkeypatch.undo()
    if killed:
        changed = msgspec.json.decode(state) | {"pushed": False, "lease": store.names("lease")[-1]}
        (one / ".stored.json").write_bytes(msgspec.json.encode(changed))
    assert work("pass") == 0
    assert {*files(one)} == {name for name in store.names() if "lease/" not in name} == {"kept.jsonl", mark, *new}
    shutil.rmtree(one / "student")  # to have room
    assert work("pass") == 0
    assert {mark, *new} <= {*files(one)}


def test_a_fetch_without_a_url_says_so_where_there_are_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "runs/stories/recipe.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no URL of a run is given; give it: make fetch RUN=s3://bucket/path"):
        fetch([""])
    assert list(files(tmp_path)) == ["runs/stories/recipe.yaml"]


def test_a_fetch_into_a_run_of_ones_own_is_refused_and_changes_nothing(tmp_path: Path, home: Path) -> None:
    store = Folder(tmp_path / "store")
    store.put("kept.jsonl", b"theirs")
    write(home, "kept.jsonl", LOCK)
    before = files(home)
    with pytest.raises(UsageError, match="home: holds another run; name an empty folder after the URL"):
        fetch([store.url, str(home)])
    assert files(home) == before


def test_a_fetch_of_a_mistyped_url_makes_no_run(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UsageError, match="stroe: there is nothing"):
        fetch([str(tmp_path / "stroe"), str(home)])
    assert not home.exists()
