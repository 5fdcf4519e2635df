"""The verifier `python`: runs the answer with its tests in a process that can do little harm (filters.verify.sandbox).

What that is worth, and how to put a container before it: docs/verifiers.md.
"""

import ast
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from filters.answer import Answer, Verified
from filters.verify import sandbox
from filters.verify.extract import ReferenceSettings, fenced_block
from filters.verify.guard import Unverified
from pipeline.records import Reason

_DRIVER = Path(sandbox.__file__).read_text(encoding="utf-8")
_GRACE_S = 30  # for the sandbox to start and end, on a busy machine; a container takes seconds
_FOR_COMMANDS = ("PATH", "HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST")


class PythonSettings(ReferenceSettings):
    tests: str | None = Field(None, description="the column that holds the tests; none: they are the reference")
    seconds: float = Field(5, gt=0, le=600)  # for the program and all its tests
    memory_mb: int = Field(512, ge=64)  # of each process
    processes: int = Field(16, ge=1)  # and threads, the first included
    disk_mb: int = Field(32, ge=1)
    site_packages: bool = False  # whether it may import the packages of this environment
    command: list[str] | None = Field(None, min_length=1)  # what starts a Python elsewhere: docker run …

    @model_validator(mode="after")
    def _runs(self) -> Self:
        if self.command is None and sys.platform != "linux":
            raise ValueError("needs Linux, or a container: `command`, see docs/verifiers.md")
        try:
            missing_layers(tuple(self.command or ()), self.site_packages)
        except Unverified as error:
            raise ValueError(f"cannot run Python programs: {error}") from None
        return self

    def tests_of(self, answer: Answer) -> list[str]:
        """The tests of a row, one text or several. Raises Unverified if there are none, or if they check nothing."""
        found = self.reference_of(answer) if self.tests is None else answer.columns.get(self.tests)
        tests = found if isinstance(found, list) else [found]
        texts = [test for test in tests if isinstance(test, str) and test.strip()]
        if not tests or len(texts) < len(tests):
            raise Unverified(f"tests must be a text or a list of texts, the row has {str(found)[:80]!r}")
        if not any(map(_checks, texts)):
            raise Unverified(
                f"the tests assert and call nothing, so any program would pass them: {texts[0].strip()[:80]!r}; "
                "add lines such as `assert add(1, 2) == 3`, or `check(add)` where they define `check`"
            )
        return texts


def _checks(test: str) -> bool:
    """Whether a test asserts, raises or calls anything when it is run, not only in functions that nothing calls."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in its texts
            todo: list[ast.AST] = [ast.parse(test)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # running it tells what is wrong
    while todo:
        match todo.pop():
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                pass
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                pass  # tests are part of the module `answer`, never `__main__`
            case ast.Expr(value=ast.Call(func=called)) if ast.unparse(called).startswith("unittest."):
                pass  # unittest.main(exit=False) counts failures and raises nothing
            case ast.Assert() | ast.Raise():
                return True
            case ast.Expr(value=value) if not isinstance(value, (ast.Constant, ast.Name, ast.Attribute)):
                return True
            case node:
                todo += ast.iter_child_nodes(node)
    return False


@cache
def missing_layers(command: tuple[str, ...], site_packages: bool) -> list[str]:
    """What the sandbox lacks on this system; a warning says it. Raises Unverified if it does not start."""
    trial = PythonSettings.model_construct(command=list(command) or None, site_packages=site_packages, seconds=20)
    missing = list(run_program("", ["pass"], trial).get("missing", []))
    if missing:
        print(
            f"warning: the rule `python` runs answers without {' and '.join(missing)}, which this system refuses; "
            "docs/verifiers.md says what that means, and how to use a container",
            file=sys.stderr,
        )
    return missing


def python(answer: Answer, settings: PythonSettings) -> Verified:
    """Drops an answer whose program does not pass its tests. The score is the share of them that pass."""
    tests = settings.tests_of(answer)
    done = run_program(fenced_block(answer.text, "python", "py", "python3", "py3"), tests, settings)
    if "what" in done:
        return Verified(Reason(rule="python", what=done["what"], found=done["error"]))
    passed, share = done["passed"], done["passed"] / len(tests)
    if done["error"]:
        return Verified(Reason(rule="python", what="error", count=passed, total=len(tests), found=done["error"]), share)
    return Verified(score=share)


def run_program(program: str, tests: list[str], settings: PythonSettings) -> dict[str, Any]:
    """How it went: `passed` tests and the first `error`, or `what` ended it. Raises Unverified if it never ran."""
    nonce, isolate = secrets.token_hex(16), settings.command is None
    limits = {
        "seconds": settings.seconds,
        "memory": settings.memory_mb << 20,
        "processes": settings.processes,
        "disk": settings.disk_mb << 20,
    }
    asked = {"program": program, "tests": tests, "limits": limits, "nonce": nonce, "isolate": isolate}
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        asked |= {"site_packages": settings.site_packages, "folder": str(Path(folder).absolute()) if isolate else None}
        with _ready_sandbox(settings, folder) as box:
            status, said = box.run(json.dumps(asked), settings.seconds + _GRACE_S)
    try:
        reply = json.loads(said)
    except ValueError:
        reply = {}
    if not isinstance(reply, dict) or reply.get("nonce") != nonce:
        if status in (sandbox.TIMED_OUT, sandbox.KILLED + signal.SIGXCPU):
            return {"what": "time", "error": f"{settings.seconds:g} s"}
        return {"what": "ended", "error": f"exit status {status}"}
    if "failed" in reply:
        raise Unverified(reply["failed"])
    if error := reply.get("error"):  # in the program's own words, which need not be text that a file can hold
        reply["error"] = error.encode(errors="replace").decode()
    return reply


@contextmanager
def _ready_sandbox(settings: PythonSettings, folder: str) -> Iterator["Sandbox"]:
    """One that waits, or a new one. A container is for one program: what that started may still be in it."""
    waiting = _waiting[os.getpid(), settings.site_packages] if settings.command is None else []
    while waiting:
        if (box := waiting.pop()).process.poll() is None:
            break
    else:
        box = Sandbox(settings, folder)
    try:
        yield box
    except BaseException:
        box.kill()
        raise
    if settings.command is None:
        waiting.append(box)
    else:
        box.end()


class Sandbox:
    """A process that runs programs, one at a time (filters.verify.sandbox)."""

    def __init__(self, settings: PythonSettings, folder: str) -> None:
        command = [*(settings.command or [sys.executable]), "-I", "-B", *([] if settings.site_packages else ["-S"])]
        names = _FOR_COMMANDS if settings.command else ()
        environment = {name: os.environ[name] for name in names if name in os.environ}
        try:
            self.process = subprocess.Popen(
                [*command, "-c", _DRIVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**environment, "MALLOC_ARENA_MAX": "1"},  # else each thread reserves 64 MiB
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            raise Unverified(f"{command[0]}: {error.strerror}") from None

    def run(self, asked: str, seconds: float) -> tuple[int, str]:
        """The exit status of the program's process and what it said. Raises Unverified if the sandbox fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        said, deadline, output = b"", time.monotonic() + seconds, self.process.stdout.fileno()
        with suppress(BrokenPipeError):  # its output says why
            self.process.stdin.write(asked.encode() + b"\n")
            self.process.stdin.flush()
        while wait([output], deadline - time.monotonic()):
            said += (piece := os.read(output, sandbox.REPLY))
            before, ended, reply = said.partition(sandbox.ENDED)
            if ended and reply.endswith(b"\n"):
                status, heard = json.loads(reply)
                if status < 0:
                    words = before.decode(errors="replace").strip()[-300:]
                    raise Unverified(f"the sandbox did not start: {words}" if words else "the sandbox was killed")
                return status, heard
            if not piece:
                if self.process.wait() < 0:
                    raise Unverified("the sandbox was killed")
                raise Unverified(f"the sandbox did not start: {said.decode(errors='replace').strip()[-300:]}")
        raise Unverified(f"the sandbox did not end in {seconds:g} s")

    def end(self) -> None:
        """Waits until what started it has ended, too: it may have a container to remove."""
        try:
            self.process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # it has ended; or sudo started it
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


_waiting: dict[tuple[int, bool], list[Sandbox]] = defaultdict(list)  # by process and `site_packages`
