"""The verifier python: programs and their tests, and programs that mean harm. None of them gets anything or stays."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from filters.answer import RuleSettings
from filters.reasons import describe
from filters.verify import programs, sandbox
from tests.filters.verifying import outcome, settings_of, verify

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
CASE = (
    "import unittest\nclass Tests(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)"
)
SUITE = "unittest.defaultTestLoader.loadTestsFromTestCase(Tests)"
CHECK = "def check(candidate): assert candidate(1, 2) == 3"
SECRET = "sk-do-not-tell"
TAG = f"# of test process {os.getpid()}"
FORKS = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError:
    pass
raise Exception(f"made {made}")
"""  # a broken sandbox would leave 200 sleeping processes, for a minute
BIG_FILE = "open('x', 'w').write('a' * 100_000_000)"
FLOOD = """
import os
while True:
    for file in range(3, 9):
        try:
            os.write(file, bytes(9))
        except OSError:
            pass
"""


@pytest.fixture(scope="module")
def settings() -> RuleSettings:
    return settings_of("python", seconds=60)  # which a busy machine does not reach


def wait_for_program(above: psutil.Process) -> psutil.Process:
    """The process of a program that runs under `above`, once it is shut in."""
    while True:
        for child in above.children(recursive=True):
            with suppress(OSError):  # it ended meanwhile
                if re.search("Max open files +64 ", Path(f"/proc/{child.pid}/limits").read_text()):
                    return child
        time.sleep(0.01)


def said(text: str, settings: RuleSettings, tests: Any = "assert True") -> str:
    """The outcome and the words of the reason."""
    verified = verify("python", text, settings, tests)
    return f"{outcome(verified)}: {verified.reason.found or verified.reason.note}" if verified.reason else "passes"


def isolated() -> bool:
    return not programs.missing_layers((), False)


@pytest.mark.parametrize(
    ("text", "tests", "expected", "score"),
    [
        (ADD, "assert add(1, 2) == 3", "passes", 1.0),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add(2, 2) == 4"], "python error", 2 / 3),
        ("def add(a, b): return a", "assert add(1, 2) == 3", "python error", 0.0),
        ("def add(a, b) return a", "assert add(1, 2) == 3", "python error", 0.0),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1", "assert A().x == 1", "passes", 1.0),
        ("if __name__ == '__main__': input()", "assert True", "passes", 1.0),
        ("import sys; sys.exit(0)", "assert False", "python error", 0.0),
        ("import os; os._exit(0)", "assert False", "python ended", None),
        # a bare comparison is a test, a call fails if it returns False, and what nothing calls checks nothing
        (ADD, ["add(1, 2) == 3", "# none\nadd(1, 2) == 4 or add(1, 2) == 5"], "python error", 0.5),
        (ADD, "for a in (1, 2):\n    add(a, a) == 2", "python error", 0.0),
        ("def is_even(n): return n % 2 == 0", ["is_even(4)", "is_even(5)", "not is_even(5)"], "python error", 2 / 3),
        (ADD, [f"{CHECK}\ncheck(add)", f"{CHECK}\ncheck(int)"], "python error", 0.5),
        (ADD, ["import math", CHECK, "check(add)"], "passes", 1.0),
        (ADD, "try:\n    add('a', 1)\nexcept TypeError:\n    pass\nelse:\n    raise ValueError", "passes", 1.0),
        (ADD, CHECK, "unverified python", None),
        (ADD, [f"'Tests.'\nimport math\nMETADATA = {{'author': 'me'}}\n{CHECK}"], "unverified python", None),
        (ADD, f"class Tests:\n    {CHECK}\nif __name__ == '__main__':\n    check(add)", "unverified python", None),
        # unittest only counts what fails
        (ADD, f"{CASE}\nunittest.main(argv=[''], exit=False)", "unverified python", None),
        (ADD, f"{CASE}\nunittest.TextTestRunner().run({SUITE})", "unverified python", None),
        (ADD, f"{CASE}\nassert unittest.TextTestRunner().run({SUITE}).wasSuccessful()", "passes", 1.0),
        ("add = max", f"{CASE}\nassert unittest.TextTestRunner().run({SUITE}).wasSuccessful()", "python error", 0.0),
        # no Python
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) =="], "unverified python", None),
        ("def add(a, b) return a", ">>> add(1, 2)\n3", "unverified python", None),
        (ADD, "    assert add(1, 2) == 3", "unverified python", None),
        (ADD, "return add(1, 2) == 3", "unverified python", None),
        (ADD, "# nothing", "unverified python", None),
        (ADD, None, "unverified python", None),
        (ADD, [], "unverified python", None),
        (ADD, {"tests": "pass"}, "unverified python", None),
    ],
)
def test_programs(settings: RuleSettings, text: str, tests: Any, expected: str, score: float | None) -> None:
    verified = verify("python", text, settings, tests)
    assert (outcome(verified), verified.score) == (expected, score)
    if score is not None and verified.reason:
        total = len(tests) if isinstance(tests, list) else 1
        assert describe(verified.reason).startswith(f"{score * total:.0f} of {total} tests pass; ")


@pytest.mark.parametrize(
    ("text", "tests", "words"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert add(2, 2) == 5"], "assert add(2, 2) == 5: AssertionError"),
        (ADD, "for a in (1, 2):\n    assert add(a, a) == 2\nassert False", "assert add(a, a) == 2: AssertionError"),
        (
            "def add(a, b): return a - '1'",
            "x = 1\nadd(x, 2)",
            "add(x, 2): TypeError: unsupported operand type(s) for -: ",
        ),
        ("def add(a, b) return a", "assert add(1, 2) == 3", "SyntaxError: "),
        ("1 / 0", "assert False", "ZeroDivisionError: division by zero"),
        (ADD, "x = 1\nadd(x, 2) == 4", "add(x, 2) == 4: AssertionError"),
    ],
)
def test_the_line_of_the_test_that_failed_is_told(settings: RuleSettings, text: str, tests: Any, words: str) -> None:
    assert said(text, settings, tests).startswith(f"python error: {words}")


def test_the_line_of_a_test_that_is_no_python_is_told(settings: RuleSettings) -> None:
    words = "unverified python: the tests are no Python: SyntaxError: invalid syntax (tests.py, line 2); a test is "
    assert said(ADD, settings, "x = 1\n>>> add(1, 2)").startswith(words)


def test_what_a_program_says_can_be_written(settings: RuleSettings) -> None:
    assert said("raise ValueError('\\ud800')", settings).encode() == b"python error: ValueError: ?"


def test_tests_may_be_a_column_and_packages_are_not_there(settings: RuleSettings) -> None:
    column = settings_of("python", tests="test_list")
    assert verify("python", ADD, column, test_list=["assert add(1, 1) == 2"]).score == 1
    assert "No module named 'pydantic'" in said("import pydantic", settings)
    assert said("import pydantic", settings_of("python", site_packages=True, seconds=60)) == "passes"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os\nfor _ in range(2000): os.write(1, bytes(1_000_000))", "passes"),  # 2 GB, which nobody reads
        ("x = 'a' * 2_000_000_000", "python error: MemoryError"),
        (BIG_FILE, "python error: OSError"),
        ("def f(): f()\nf()", "python error: RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "python ended: exit status 139"),
        ("import os; os._exit(3)", "python ended: exit status 3"),
        ("class E(Exception):\n  def __str__(self): return 'x' * 1_000_000\nraise E", "python error: E: xxx"),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL); os.killpg(0, 15)", "p"),
    ],
)
def test_a_program_that_means_harm(settings: RuleSettings, program: str, expected: str) -> None:
    assert said(program, settings).startswith(expected)
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"  # the next one is judged


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("while True: pass", "python time: 3 s"),
        ("import time; time.sleep(600)", "python time: 3 s"),  # longer than a test may take
        (FLOOD, "python time: 3 s"),
    ],
)
def test_a_program_that_does_not_end(settings: RuleSettings, program: str, expected: str) -> None:
    assert said(program, settings_of("python", seconds=3)).startswith(expected)
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"  # the next one is judged


@pytest.mark.skipif(not isolated(), reason="this kernel or container refuses namespaces or Landlock")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os; raise Exception(dict(os.environ))", "Exception: {}"),
        ("open('/proc/self/environ').read()", "FileNotFoundError"),
        ("open('/proc/1/environ').read()", "FileNotFoundError"),
        ("open('/etc/passwd').read()", "FileNotFoundError"),
        (f"open({__file__!r}).read()", "FileNotFoundError"),
        ("import os; raise Exception(os.listdir())", "Exception: []"),
        ("import os; raise Exception(os.getcwd())", f"Exception: {sandbox.WORK}"),
        ("open('/usr/lib/planted', 'w')", "OSError: [Errno 30]"),
        ("open('../planted', 'w')", "PermissionError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import socket; socket.socket(type=2).sendto(b'x', ('127.0.0.1', 9))", "OSError: [Errno 101]"),
        ("import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])", "FileNotFoundError"),
        ("import os; os.setuid(0)", "PermissionError"),
        ("import os; os.kill(HOST, 9)", "ProcessLookupError"),
        (FORKS, "Exception: made 15"),
    ],
)
def test_a_program_reaches_nothing(
    settings: RuleSettings, program: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    heard = said(program.replace("HOST", str(os.getpid())), settings)
    assert heard.startswith(f"python error: {expected}") and SECRET not in heard


def test_nothing_stays(settings: RuleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(programs, "_DRIVER", programs._DRIVER + TAG)  # forks of it have the same command line
    monkeypatch.setattr(programs, "_waiting", waiting := defaultdict[tuple[int, bool], list[programs.Sandbox]](list))
    threads = "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(60,)).start()"
    assert said(threads, settings) == "passes"
    assert said("open('x', 'w').write('x')\n" + FORKS, settings).startswith("python error")
    assert list(tmp_path.iterdir()) == []
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert sum(TAG.encode() in command for command in running) == 1  # the sandbox that waits for the next one
    waiting[os.getpid(), False].pop().kill()


@pytest.mark.parametrize("killed", ["the sandbox", "its fork"])
def test_a_sandbox_that_is_killed_says_nothing_of_the_answer(settings: RuleSettings, killed: str) -> None:
    def kill_it() -> None:
        fork = wait_for_program(psutil.Process()).parent()
        (fork.parent() if killed == "the sandbox" else fork).kill()

    killer = threading.Thread(target=kill_it)
    killer.start()
    assert said("import time; time.sleep(2)", settings) == "unverified python: the sandbox was killed"
    killer.join()
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"  # the next one is judged


def test_a_sandbox_that_died_while_it_waited_costs_no_answer(settings: RuleSettings) -> None:
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"
    for box in programs._waiting[os.getpid(), False]:
        box.process.kill()
        box.process.wait()
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"


def test_temporary_folders_may_be_in_the_working_folder(
    settings: RuleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", ".")
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"


def test_programs_share_a_sandbox_and_nothing_else(settings: RuleSettings) -> None:
    meddles = "import ast, json, sys\njson.loads = ast.parse = None\nsys.left = 1\nopen('left', 'w')\n" + ADD
    assert said(meddles, settings, "assert add(1, 2) == 3") == "passes"
    (box,) = programs._waiting[os.getpid(), False]
    files = sorted(Path(f"/proc/{box.process.pid}/fd").iterdir())
    assert said("import os, sys; raise Exception(os.listdir(), hasattr(sys, 'left'))", settings).endswith("([], False)")
    assert sorted(Path(f"/proc/{box.process.pid}/fd").iterdir()) == files  # nothing of either is left open
    assert all("libffi" in file.readlink().name for file in files[3:])  # some systems' ctypes keeps its library open


def test_a_program_is_not_in_the_memory_that_the_next_one_has(settings: RuleSettings) -> None:
    assert said("secret = 'of the first answer'", settings, "assert secret == 'of the first answer'") == "passes"
    (box,) = programs._waiting[os.getpid(), False]
    regions = re.findall(r"^(\w+)-(\w+) rw", Path(f"/proc/{box.process.pid}/maps").read_text(), re.MULTILINE)
    with Path(f"/proc/{box.process.pid}/mem").open("rb") as memory:
        for start, end in regions:
            memory.seek(int(start, 16))
            assert b"of the first answer" not in memory.read(int(end, 16) - int(start, 16))


def test_a_program_ends_with_the_filters() -> None:
    code = (
        "from filters.verify import programs\n"
        "programs.run_program('while True: pass', ['pass'], programs.PythonSettings(seconds=60))"
    )
    filters = psutil.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    program = wait_for_program(filters)
    below = [program, program.parent(), program.parent().parent()]
    filters.kill()
    filters.wait()
    assert psutil.wait_procs(below, timeout=20)[1] == []


def test_what_starts_it_may_be_a_container(capfd: pytest.CaptureFixture[str]) -> None:
    elsewhere = settings_of("python", command=["nice", "-n", "1", sys.executable], seconds=60)
    assert said("import os; raise Exception(os.nice(0) > 0, dict(os.environ))", elsewhere).endswith("(True, {})")
    silent = ["sh", "-c", '"$@" < /dev/null', "sh", sys.executable]
    for command, problem in (
        (["no-such-docker", "run"], "No such file"),
        (["echo", "refused:"], "refused:"),
        (silent, "did not start: it gets no standard input"),
    ):
        with pytest.raises(ValidationError, match=problem):
            settings_of("python", command=command)


def test_a_process_that_a_program_leaves_in_a_container_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = settings_of("python", command=["nice", sys.executable], seconds=5)
    monkeypatch.setattr(programs, "_GRACE_S", 5)
    left = "import os, time\nif os.fork() == 0:\n    time.sleep(20)\n    os._exit(0)"
    assert said(left, elsewhere) == "passes"


def test_a_sandbox_whose_fork_failed_ends() -> None:
    driver = [sys.executable, "-I", "-S", "-c", Path(sandbox.__file__).read_text()]
    done = subprocess.run(driver, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
    assert done.stdout.splitlines()[1:] == [b'ended [-9, ""]']


def test_what_starts_a_container_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have to remove the container; and sudo cannot be killed."""

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("os.killpg", refuse)
    removes = ["sh", "-c", f'"$@"; echo removed >> {tmp_path}/removed', "sh", sys.executable]
    settings = settings_of("python", command=removes, seconds=60)
    assert said(ADD, settings, "assert add(1, 2) == 3") == "passes"
    assert (tmp_path / "removed").read_text() == "removed\n" * 2  # the settings try it
    monkeypatch.setattr(programs, "_GRACE_S", 0.1)
    silent = programs.PythonSettings.model_construct(command=["sh", "-c", "cat > /dev/null"], seconds=0.1)
    assert said(ADD, silent) == "unverified python: the sandbox did not end in 0.2 s"


def test_a_layer_that_is_refused_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "run_program", lambda *_: {"missing": ["namespaces", "landlock"]})
    programs.missing_layers.cache_clear()
    try:
        settings_of("python")
        settings_of("python")
    finally:
        programs.missing_layers.cache_clear()
    warning = capfd.readouterr().err
    assert warning.count("without namespaces and landlock") == 1 and "docs/verifiers.md" in warning


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="takes a right away from root")
@pytest.mark.skipif(not os.access("/usr/bin/python3", os.X_OK), reason="another user must be able to read this Python")
def test_without_namespaces_nothing_can_be_started(tmp_path: Path) -> None:
    """As root in a container has it: the right to make namespaces is missing."""
    Path(tmp_path).chmod(0o755)
    limits = {"seconds": 60, "memory": 512 << 20, "processes": 16, "disk": 32 << 20}
    asked = {"tests": [], "limits": limits, "nonce": "n", "isolate": True, "site_packages": False}
    weaker = ["setpriv", "--inh-caps", "-sys_admin", "--bounding-set", "-sys_admin"]
    for program, error in (
        (FORKS, "Exception: made 0"),
        ("open('/etc/passwd')", "PermissionError"),
        ("import os; raise Exception(os.getgroups(), {*os.getresgid()} & {0})", "Exception: ([], set())"),
        (BIG_FILE, "OSError: [Errno 27]"),
    ):
        done = subprocess.run(
            [*weaker, "/usr/bin/python3", "-I", "-S", "-c", Path(sandbox.__file__).read_text()],
            input=json.dumps({**asked, "program": program, "folder": None}).encode(),
            capture_output=True,
            cwd=tmp_path,
            check=True,
        )
        status, said = json.loads(done.stdout.removeprefix(sandbox.ENDED))
        reply = json.loads(said)
        assert status == 0 and reply["missing"] == ["namespaces"] and reply["error"].startswith(error)
