"""A run directory: where each file of a run is, who may write to it, and how files appear in it.

Journals (completions, logprobs, failures, a person's reviews) are append-only. Every other file appears by rename, so
that an interrupted stage leaves the old file or the new one.
"""

import errno
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec
import yaml

from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from pipeline.records import encode_line

_OS_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)")  # safetensors; shutil.copytree
_TORN_ARCHIVE = re.compile(r"inline_container.*unexpected pos|PytorchStreamWriter failed", re.DOTALL)


class File:
    """A file or folder of a run, as an attribute of RunDir: its path."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunDir", kind: type["RunDir"]) -> Path:
        return run.path / self._name


LOCK = ".lock"  # the file that says which process has the run
CHAIN_LOCK = ".chain.lock"  # and which chain: it holds the run between its stages, too
CHAINED_S = 60.0  # that a stage of a chain waits for one that was started by hand
SERVED = "served-"  # begins the names of an evaluation's folders that it empties, journals too, when it starts again


@dataclass(frozen=True)
class RunDir:
    """Where the files of one run are, and who writes them."""

    path: Path
    internal: bool = field(default=False, compare=False)  # in another run, of one stage that alone reads its answers
    first: bool = field(default=False, compare=False)  # of those: may end early if all thoughts are cut off
    recipe = File("recipe.yaml")  # as resolved; `generate`
    lineage = File("lineage.json")  # every stage
    prompts = File("prompts.jsonl")  # `generate`
    completions = File("completions.jsonl")  # `generate`
    logprobs = File("logprobs.jsonl")  # of the answers' tokens, if the recipe wants them; `generate`
    failures = File("failures.jsonl")  # `generate`
    kept = File("kept.jsonl")  # `filters`
    dropped = File("dropped.jsonl")  # `filters`
    preferences = File("preferences.jsonl")  # pairs of a kept and a failed answer, if the recipe wants them; `filters`
    judgements = File("judgements.jsonl")  # the judge's verdicts; `filters`
    filter_report = File("filter_report.json")  # `filters`
    review_sample = File("review_sample.json")  # the answers that a person reviews; `filters.review`
    reviews = File("reviews.jsonl")  # the person's verdicts, in the order given; `filters.review`
    teacher_logprobs = File("teacher_logprobs.jsonl")  # as its endpoint said (`kd.teacher: served`); `train`
    checks = File("checks.json")  # what was checked before training; `train`
    validation = File("validation.jsonl")  # the kept rows that chose the best checkpoint; `train`
    test = File("test.jsonl")  # the kept rows that training never saw; `train`
    student_init = File("student-init")  # a student that was made first (`prune:<k>`, `new:30m`), untrained; `train`
    student = File("student")  # `train`
    student_sft = File("student-sft")  # the student before a further method: its own samples, preferences; `train`
    report = File("report.json")  # `evaluate`
    report_html = File("report.html")  # `evaluate`

    @property
    def name(self) -> str:
        """The folder's own name, also where its path ends otherwise (`.`, `..`)."""
        return self.path.name if self.path.name not in ("", "..") else self.path.resolve().name

    def check_folder(self) -> None:
        """Raises UsageError if the run's path is a file, or a link that leads nowhere."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path}: a file, but a run is a folder; give the run's folder with --run")
        if self.path.is_symlink() and not self.path.exists():
            target = self.path.readlink()
            raise UsageError(
                f"{self.path}: a link to {target}, which is not there; make that folder, or remove the link"
            )

    def check_there(self) -> None:
        """Raises UsageError if the folder does not exist: a mistyped name should not make a run."""
        self.check_folder()
        if not self.path.is_dir():
            raise UsageError(f"{self.path}: no such run; give its folder with --run, or generate first")

    @contextmanager
    def locked(self, *, new: bool = False, name: str = LOCK) -> Iterator[None]:
        """Holds the run for this process, by the file `name`. `new` makes the folder if it does not exist.

        The kernel drops the lock with the process, so a killed run never leaves a stale one. Raises UsageError if the
        folder does not exist or another process holds it (its pid is named), for a stage of a chain after a minute, and
        DistillError if the file system cannot lock.
        """
        if new:
            self.check_folder()
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self.check_there()
        with (self.path / name).open("a+") as file:
            try:
                self._take(file)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                if holder == str(os.getpid()):
                    raise UsageError(
                        f"{self.path}: another call in this process works on this run, or a process that it started; "
                        "wait for it, or choose another directory"
                    ) from None
                raise UsageError(
                    f"{self.path}: another process (pid {holder}) works on this run; wait for it, stop it, "
                    "or choose another directory with --run"
                ) from None
            except OSError as error:  # ENOLCK, ENOTSUP, …: some network file systems
                raise DistillError(
                    f"{self.path}: the file system cannot lock this run ({error.strerror}); "
                    "choose a directory on a local disk with --run"
                ) from None
            os.set_inheritable(file.fileno(), True)  # the processes that share the work hold it too
            with naming(self.path / name):
                file.truncate(0)
                os.write(file.fileno(), str(os.getpid()).encode())
            yield

    def _take(self, file: TextIO) -> None:
        """Locks the file; a stage of a chain waits for it. Raises BlockingIOError if another process holds it."""
        deadline, told = time.monotonic() + (CHAINED_S if self._is_chained() else 0.0), False
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
            if not told:
                said = f"{self.path}: another process works on this run; waiting up to {CHAINED_S:.0f} s for it"
                print(said, file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)

    def _is_chained(self) -> bool:
        """Whether the chain that has the run started this process."""
        try:
            return (self.path / CHAIN_LOCK).read_text() == str(os.getppid())
        except OSError:
            return False

    def save_recipe(self, recipe: Recipe) -> None:
        """Writes the recipe as resolved from YAML, environment and flags. It holds no secret."""
        text = yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
        write_file(self.recipe, text.encode())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names this file if it names none, as that of a full disk or of a lock does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` if the block ends without an error. Otherwise `path` stays as it is.

    The file and its new name are on disk when the block has ended: a power cut leaves the old file or the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Holds this lock file; while another process holds it, waits. The kernel drops the lock with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        with naming(path):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that replaces `folder` if the block ends without an error. Otherwise `folder` stays as it is.

    What is in it is on disk before it has its name. Only one process at a time may do so: the caller holds the run, or
    a `waiting_lock`. A link stays, and the folder that it leads to is replaced. Raises UsageError if it is a file.
    """
    if folder.is_symlink():
        folder = folder.resolve()
    if folder.is_file():
        raise UsageError(f"{folder}: a file, but a folder is written there; move it away")
    building, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old.tmp")

    def clear() -> None:
        if old.exists() and not folder.exists():  # stopped between the two renames below
            old.rename(folder)
        for left in (building, old):
            shutil.rmtree(left, ignore_errors=True)

    clear()
    building.mkdir(parents=True)
    try:
        with writing_weights(folder):
            yield building
        share_files(building)
        sync_tree(building)
        with suppress(FileNotFoundError):
            folder.rename(old)
        building.rename(folder)
        sync_path(folder.parent)
    finally:
        clear()


@contextmanager
def writing_weights(folder: Path) -> Iterator[None]:
    """Raises OSError where a library cannot write into the folder; some have errors of their own for it."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(folder)  # that of a full disk names no file
            raise
        if found := _OS_ERROR.search(str(error)):
            number = int(found[1])
        elif _TORN_ARCHIVE.search(str(error)):  # PyTorch does not say why; nearly always the disk is full
            number = errno.ENOSPC
        else:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from None


def sync_path(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Returns when a folder, with all that is in it, is on disk: a power cut leaves it as it is."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


def share_files(folder: Path) -> None:
    """Who may read a folder may read its files from now on: safetensors writes files for their owner alone."""
    readable = folder.stat().st_mode & 0o444
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if mode | readable != mode and not path.is_symlink():
            path.chmod(mode | readable)


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file in place of the old one."""
    with replacing(path) as file:
        file.write(data)


def write_jsonl(path: Path, records: Iterable[msgspec.Struct]) -> None:
    """Writes records, one per line, in place of the old file."""
    with replacing(path) as file:
        file.writelines(map(encode_line, records))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON in place of the old file."""
    write_file(path, encode_json(value))


def encode_json(value: Any) -> bytes:
    """A value as the content of a JSON file: indented, for people."""
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"
