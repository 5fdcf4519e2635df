"""A run's local folder and the same run in a store: fetched at the start, followed, put back at the end.

lease/…                                  who works on it (scale.run_lease)
parts/…, completions.jsonl, …            answers and failures (scale.journals)
cluster/…                                where driver and workers meet (scale.generation): no part of the folder
spend.json, recipe.yaml, kept.jsonl, …   every other file of the run directory, under its own name
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from uuid import uuid4

import msgspec

from pipeline.address import is_in_store
from pipeline.errors import DistillError, UsageError
from pipeline.records import read_json
from pipeline.rundir import SERVED, RunDir, write_file
from scale.journals import JOURNALS, StoredJournals
from scale.run_lease import TakenOver
from scale.storage import Store, open_store, retried

STATE_FILE = ".stored.json"
CLUSTER, CLUSTER_FILE = "cluster", "cluster-store.txt"  # where driver and workers meet, and what records it
WHOSE_PLACE = "run.txt"  # there: the run that was given the place
RAY = "training-ray"  # where Ray Train keeps its books, in a local folder
NOT_FILES = ("lease", "parts", CLUSTER, "training-rows", RAY)  # no files of the run are in these folders
TRAIN_READS = ("kept.jsonl", "logprobs.jsonl", "preferences.jsonl")  # files of the run
TRAIN_WRITES = (  # files and folders
    *("lineage.json", "checks.json", "validation.jsonl", "test.jsonl", "teacher_logprobs.jsonl"),
    *("student-init", "student", "student-sft", "training", "tensorboard"),
)
# What the user may remove here, to begin it anew: the next command removes it from the store.
REMOVABLE = ("training", "review_sample.json", "reviews.jsonl", "judgements.jsonl")
UNKNOWN = (-1, 0)  # stamp of a file that the store has, but of which the folder's state says nothing
STUDENTS = ("student-init", "student")  # what `serve` reads of a run
WHOLE = "trainer_state.json"  # is written last in each checkpoint
STUDENTS_WHOLE = ("student/lineage.json", "student-sft/lineage.json")


class StoreState(msgspec.Struct):
    """What a local folder knows of its store."""

    owner: str  # names this folder in leases and parts
    url: str = ""  # of the store; empty in a copy that was fetched
    source: str = ""  # the store that a copy was fetched from
    lease: str = ""  # the last under which it had all that the store had
    files: dict[str, tuple[int, int]] = {}  # what the store has of it: size and time of change
    left: list[str] | None = None  # what a fetch that has not ended leaves as it is here (Mirror.leave_changed)
    pushed: bool = True  # no command has begun since the store got all that had changed here

    @classmethod
    def read(cls, folder: Path) -> "StoreState":
        """A new folder gets an owner's name. Raises DataError."""
        fix = "move it away, and run the same command with --take-over"
        return read_json(folder / STATE_FILE, cls, fix) or cls(uuid4().hex[:12])

    def save(self, folder: Path) -> None:
        """Replaces the file."""
        write_file(folder / STATE_FILE, msgspec.json.encode(self))


def meeting_store(run: RunDir, asked: str | None, folder: Path) -> Store:
    """Where the driver and the workers of a run meet: always where they first did, which the run records.

    `asked`: a folder or URL, else it is below the run's own address. `folder`: the run's, or that of a pass of it.
    Raises UsageError if the run has another place, or if the place is another run's; as open_store.
    """
    record, home = run.path / CLUSTER_FILE, StoreState.read(run.path).url
    place = f"{home}/{CLUSTER}" if home else CLUSTER
    if asked:
        place = asked.rstrip("/") if is_in_store(asked) else str(Path(asked).absolute())
    known = record.read_text() if record.exists() else place
    found, wanted = (one if "://" in one else str(run.path.absolute() / one) for one in (known, place))
    if asked and found != wanted:
        raise UsageError(
            f"--cluster-store {asked}: this run has {found}, which knows what lost workers may have spent; "
            "leave the flag out"
        )
    store = open_store("/".join((found, *folder.relative_to(run.path).parts)))
    if not record.exists():
        if asked:
            _take_place(run, asked, open_store(found))
        write_file(record, place.encode())
    return store


def _take_place(run: RunDir, asked: str, store: Store) -> None:
    """Makes a place this run's. Raises UsageError if another has it: each would take in the other's answers."""
    ours = str(run.path.absolute()).encode()
    if not store.put_new(WHOSE_PLACE, ours) and (theirs := store.get(WHOSE_PLACE) or b"") != ours:
        raise UsageError(
            f"--cluster-store {asked}: {theirs.decode()} meets there; give this run a place of its own, as "
            f"{asked.rstrip('/')}/{run.path.name}, or remove what is there if that run is gone"
        )


class Mirror:
    """A run's folder, which this process alone changes or has changed, and its store."""

    def __init__(self, store: Store, folder: Path, state: StoreState, check: Callable[[], None] = lambda: None) -> None:
        """`check` is called before each change of the store but new answers. It raises TakenOver if another machine
        has the run: its files are the newer ones.
        """
        self._store, self._folder, self._state, self._check = store, folder, state, check
        self._journals = StoredJournals(store, folder, state.owner)
        self.unstored: dict[str, int] = {}  # by kind: rows that only this machine had at the last upload

    def fetch(self, *, keep: bool = False) -> None:
        """Brings what the store has: rows that the journals lack, and files.

        `keep`: local files are the newer ones, and what was removed here, by a stage or by the user, stays removed.
        """
        kinds, names, whole = set(), self._store.names(), True
        removed = {name for name in names if keep and self._is_removed(name)}
        for what in sorted({first if (first := _first(name)) in REMOVABLE else name for name in removed}):
            print(f"{what}: was removed here, so it is removed from {self._store.url} too", file=sys.stderr)
        students = self._students(names)
        if not keep:
            self._remove(self._outdated(names))
        for name in names:
            path = PurePosixPath(name)
            if path.parts[0] == "parts":
                kinds.add(str(path.relative_to("parts").parent))
            elif path.name in JOURNALS:
                kinds.add(str(path.with_suffix("")))
            elif _is_file(name) and keep and (self._folder / name).exists():
                self._state.files.setdefault(name, UNKNOWN)
            elif _is_file(name) and name not in removed:
                whole &= self._download(name)
        replaced = self._students(names) != students
        if not keep and (replaced or not whole):  # a training elsewhere has put a student, or a checkpoint, for another
            now = self._store.names()
            self._remove(self._outdated(now))
            self.fetch_files(filter(_is_file, now if replaced else {*now} - {*names}))
        for kind in sorted(kinds):
            self._journals.merge(kind)
        self._state.pushed = False

    def leave_changed(self) -> list[str]:
        """From now on no file that was changed or made here is replaced or removed. Returns what the store has of them.

        If a file of a training was, all files of one stay: none is of two. If the last fetch was cut off, its choice
        holds: it has not recorded which files it has brought.
        """
        if self._state.left is None:
            here = filter(_is_file, self._files())
            changed = {name for name in here if self._state.files.get(name) != _stamp(self._folder / name)}
            trained = {name for name in changed if _first(name) in TRAIN_WRITES}
            self._state.left = sorted((changed - trained).union(TRAIN_WRITES if trained else ()))
            self._state.save(self._folder)
        stored = {part for name in self._store.names() for part in (name, _first(name))}
        return [name for name in self._state.left if name in stored]

    def fetch_files(self, names: Iterable[str]) -> None:
        """Brings these files as the store has them. Raises DistillError if one is gone."""
        for name in names:
            if not self._download(name):
                raise DistillError(f"{self._store.url}/{name}: was removed just now; run the same command again")

    def fetch_trained(self) -> None:
        """Brings what `train` has written elsewhere, in place of what is here."""
        names = names_in(self._store, TRAIN_WRITES)
        self._remove(name for name in {*self._files()} - {*names} if _first(name) in TRAIN_WRITES)
        self.fetch_files(names)

    def fetch_student(self) -> None:
        """Brings the student, and what it was made from, in place of older ones."""
        names = names_in(self._store, STUDENTS)
        students = self._students(names)
        self._remove(name for name in self._outdated(names) if _first(name) in STUDENTS)
        self.fetch_files(names)
        if self._students(names) != students:
            raise DistillError(f"{self._store.url}/student: was replaced just now; run the same command again")

    def upload(self, *, rest: bool = False) -> None:
        """Puts the parts that are to be closed now; with `rest` all rows. Sets `unstored`.

        And what the run has spent, unless another machine has the run, and says that.
        """
        with suppress(TakenOver):
            for name in (CLUSTER_FILE, "spend*.json"):
                self._put(self._matching(name))  # first: what was in flight then may be in the parts
        here = (journal for name in JOURNALS for journal in self._matching(name))
        self.unstored = self._journals.upload(here, rest=rest)

    def compact(self) -> None:
        """Puts each journal whole, in place of the parts that are in it. Everything is uploaded."""
        self._journals.compact(self._check)

    def push(self) -> None:
        """Puts every other file that has changed, and removes from the store those that are gone."""
        self._put_files(_is_file)
        self._state.pushed = True

    def put_training(self) -> None:
        """Puts what a training here, or of an experiment's arm, writes as it goes on: its checkpoints, its student.

        No checkpoint is removed before all that are here are put (one may need the weights of an earlier one, the
        best), and none before the student that the training ends with.
        """
        before = dict(self._state.files)
        try:
            for folder in (self._folder, *self._folder.glob("experiments/*/*")):
                with suppress(FileNotFoundError):  # it was removed just now: the next call sees that
                    self._put_training("" if folder == self._folder else f"{self._name(folder)}/")
        finally:
            if self._state.files != before:
                self._state.save(self._folder)

    def _put_training(self, run: str) -> None:
        """`run` begins the names of what belongs to it."""
        work, wanted = f"{run}training/", {*TRAIN_READS, *TRAIN_WRITES} - {"training"}
        goes_on = (self._folder / work).exists()  # until its student is there
        student = f"{run}student/lineage.json"
        if (self._folder / student).exists() and self._has_changed(student):
            self._put_files(lambda name: name.startswith(run) and _first(name.removeprefix(run)) in wanted)
        stored = {name for name in list(self._state.files) if name.startswith(work)}
        if not goes_on:
            self._delete(stored)
            return
        checkpoints, fingerprint = self._whole_checkpoints(work), f"{work}fingerprint"
        files = (map(self._name, filter(Path.is_file, folder.rglob("*"))) for folder in checkpoints)
        names = [name for own in files for name in _marks_last(own)]
        if not names or not (self._folder / fingerprint).exists():  # it has begun, or ended, just now
            return
        if self._has_changed(fingerprint):
            self._delete(stored)  # they are another training's
        self._put([fingerprint, *names])
        if self._whole_checkpoints(work) == checkpoints:  # else the training has gone on: the next call sees that
            self._delete(stored.intersection(self._state.files) - {fingerprint, *names})

    def _whole_checkpoints(self, work: str) -> list[Path]:
        states = self._folder.glob(f"{work}checkpoint-*/{WHOLE}")
        return sorted((state.parent for state in states), key=lambda folder: int(folder.name.rpartition("-")[2]))

    def _put_files(self, belongs: Callable[[str], bool]) -> None:
        """Puts these files if they have changed, and removes from the store those that are gone.

        An older student is removed first, and what makes one whole is put last, so that nobody finds one of two.
        """
        marks = {}
        for name in filter(belongs, self._files()):
            if name.endswith(STUDENTS_WHOLE) and self._has_changed(name):
                marks[name] = _stamp(self._folder / name), (self._folder / name).read_bytes()
        students = tuple(name.removesuffix("lineage.json") for name in marks)
        stored = [name for name in list(self._state.files) if name.startswith(students)]
        self._delete(filter(self._has_changed, stored))
        here = [*filter(belongs, self._files())]
        self._put(name for name in _marks_last(here) if name not in marks)
        for name, (stamp, data) in marks.items():
            if _stamp(self._folder / name) != stamp:
                raise FileNotFoundError(name)  # a training that goes on has put another in its place
            retried(self._store.put, name, data, check=self._check)
            self._state.files[name] = stamp
        self._delete({*filter(belongs, list(self._state.files))} - {*here})

    def _students(self, names: Iterable[str]) -> set[tuple[str, bytes | None]]:
        """What makes the students whole that the store has now."""
        return {(name, self._store.get(name)) for name in names if name.endswith(STUDENTS_WHOLE)}

    def _is_removed(self, name: str) -> bool:
        """Whether a file of the store was removed here: by the user, to begin anew what it belongs to, or by a stage.

        By a stage: if a command has begun since the last push, and the file's folder is still here. A folder that is
        gone as a whole may have been removed to have room.
        """
        path = self._folder / name
        if name not in self._state.files or path.exists():
            return False
        return _first(name) in REMOVABLE or (not self._state.pushed and path.parent.exists())

    def _download(self, name: str) -> bool:
        """Brings a file, unless it is to stay as it is here; False if it is gone."""
        if self._is_left(name):
            return True
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        loading = path.with_name(path.name + ".tmp")
        if not self._store.download(name, loading):
            return False
        loading.replace(path)
        self._state.files[name] = _stamp(path)
        return True

    def _remove(self, names: Iterable[str]) -> None:
        """Removes here what the store no longer has."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)
            self._state.files.pop(name, None)

    def _outdated(self, names: Collection[str]) -> set[str]:
        """What the store had and has no longer, and what is here beside a training that it has: none is of two."""
        stored = {_first(name) for name in names} & set(TRAIN_WRITES)
        beside = {name for name in self._files() if _first(name) in stored}
        return {name for name in (self._state.files.keys() | beside) - set(names) if not self._is_left(name)}

    def _is_left(self, name: str) -> bool:
        left = self._state.left or ()
        return name in left or _first(name) in left

    def _put(self, names: Iterable[str]) -> None:
        for name in names:
            stamp = _stamp(self._folder / name)
            if self._state.files.get(name) != stamp:
                retried(self._store.put, name, self._folder / name, check=self._check)
                self._state.files[name] = stamp

    def _has_changed(self, name: str) -> bool:
        """Whether a file is not here as the store has it."""
        path = self._folder / name
        return not path.exists() or self._state.files.get(name) != _stamp(path)

    def _delete(self, names: Iterable[str]) -> None:
        for name in reversed(_marks_last(names)):
            retried(self._store.delete, name, check=self._check)
            del self._state.files[name]

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _matching(self, name: str) -> list[str]:
        """The files of this name, in whichever folder; not those that begin anew, and no links to another's."""
        found = (path for path in self._folder.rglob(name) if not path.is_symlink())
        return [name for name in map(self._name, found) if _first(name) not in NOT_FILES and f"/{SERVED}" not in name]

    def _files(self) -> Iterator[str]:
        """The files of the run; not those that are still being written, or are this folder's own."""
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder)
            if path.is_file() and not any(part.startswith(".") or part.endswith(".tmp") for part in name.parts):
                yield name.as_posix()


def names_in(store: Store, folders: Collection[str]) -> list[str]:
    """The names in the store that are one of these files or folders, or are below one."""
    return [name for name in store.names() if _first(name) in folders]


def _is_file(name: str) -> bool:
    """Whether a name in the store, or below the folder, is one of the run's files, and no journal."""
    return _first(name) not in NOT_FILES and PurePosixPath(name).name not in JOURNALS


def _marks_last(names: Iterable[str]) -> list[str]:
    """What makes a checkpoint or a student whole is put last, and removed first."""
    return sorted(names, key=lambda name: name.endswith((WHOLE, "lineage.json")))


def _first(name: str) -> str:
    return PurePosixPath(name).parts[0]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
