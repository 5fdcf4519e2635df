"""Runs programs and their tests where they can do little harm. Standard library only: it is run by `python -c`.

Each line of standard input asks for one program, a line of standard output tells how it went (see `main`). What each
layer is worth, and what none of them stops, is in docs/verifiers.md. All of it works without root; a layer that the
kernel refuses is named in the reply under `missing`. Sources: namespaces(7), landlock(7), setrlimit(2).
"""

import ast
import ctypes
import json
import os
import resource
import select
import signal
import sys
import types
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWUSER, _NEWPID, _NEWNET, _NEWIPC = 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MS_LOCKED = 0xC0E  # nosuid, nodev, noexec, noatime, nodiratime: a remount must keep what is set
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_SYSTEM = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]  # shared libraries, time zones
_DEVICES = ["/dev/null", "/dev/zero", "/dev/urandom"]
ENDED = b"ended "  # begins a line of standard output; what starts a container may say more
REPLY = 1 << 16  # bytes that are read of what a program's process says
TIMED_OUT, KILLED = 124, 128  # exit statuses as shells have them: KILLED + the signal
WORK = "/answer"  # the only folder that a program can write, where namespaces work


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def restrict_files(read: Iterable[str], write: Iterable[str]) -> bool:
    """Landlock: from now on only these paths can be read, these written, no program run, no TCP port used.

    Returns False, and does nothing, if the kernel has no Landlock.
    """
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15)) - 1
    net, scope = 3 if version >= 4 else 0, 3 if version >= 6 else 0  # TCP; abstract sockets and signals
    rules = (ctypes.c_uint64 * 3)(files, net, scope)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, rules, size, 0)
    if ruleset < 0:
        return False
    for paths, allowed in ((read, _READ_FILE | _READ_DIR), (write, files)):
        for path in filter(os.path.exists, paths):
            rights = allowed if os.path.isdir(path) else allowed & (_READ_FILE | 2)  # 2: write to a file
            opened = os.open(path, os.O_PATH)
            rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            _LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
            os.close(opened)
    done = _LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return bool(done == 0)


def limit(name: str, most: int) -> None:
    """Sets one of setrlimit's limits for good, to less where less is allowed."""
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def main() -> None:
    """Runs what each line asks for, one after the other: a fork of this process starts sooner than a new Python.

    Answers with ENDED, the fork's exit status and what it said. The fork reads the line: this process never has a
    program in its memory, where a later one could find it. Ends if a fork is killed: it may not have read all.
    """
    requests, status = select.poll(), 0
    requests.register(0, select.POLLIN)
    while status >= 0 and requests.poll()[0][1] & select.POLLIN:
        heard, reply = os.pipe()
        if (fork := os.fork()) == 0:
            try:
                os.close(heard)
                if line := sys.stdin.buffer.readline():
                    _run_one(json.loads(line), reply)
                else:
                    print("it gets no standard input (docker and podman need -i)", flush=True)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)  # what failed is not the program
        os.close(reply)
        said = _hear(heard)
        status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        sys.stdout.buffer.write(ENDED + json.dumps([status, said.decode(errors="replace")]).encode() + b"\n")
        sys.stdout.buffer.flush()


def _hear(pipe: int) -> bytes:
    """What is said until the pipe ends, or REPLY bytes of it. Ends this process when nobody reads its output."""
    events = select.poll()
    events.register(pipe, select.POLLIN)
    events.register(1, 0)
    said = b""
    while len(said) < REPLY:
        if 1 in dict(events.poll()):
            os._exit(1)  # the program ends with it
        if not (piece := os.read(pipe, REPLY)):
            break
        said += piece
    os.close(pipe)
    return said


def _run_one(asked: dict[str, Any], reply: int) -> None:
    """Runs a `program`, then its `tests`, in a `folder` (none: this one) under `limits` (seconds, bytes, processes).

    An object with the `nonce` is written to `reply` if the program and its tests came to their end.
    """
    os.setsid()
    die_with_parent()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.environ.clear()
    os.umask(0o022)
    if asked["folder"]:
        os.chdir(asked["folder"])
    user = 20_000 + os.getpid() % 40_000  # in place of root: one of its own, so that its processes can be counted
    apart = not asked["isolate"] or _unshare()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.setsid()  # its signals reach nobody else
        try:
            missing = _shut_in(asked, user, apart) if asked["isolate"] else []
            if "namespaces" in missing:
                asked["limits"]["processes"] = 0  # nobody would end them
            _limit(asked["limits"], alone=asked["isolate"])
            answer = {"missing": missing, **_run(asked["program"], asked["tests"])}
        except BaseException as error:
            answer = {"failed": f"the sandbox failed: {type(error).__name__}: {error}"}
        os.write(reply, json.dumps({"nonce": asked["nonce"], **answer}).encode())
        os._exit(0)
    os.close(reply)
    in_time = signal.sigtimedwait({signal.SIGCHLD}, asked["limits"]["seconds"])
    with suppress(ProcessLookupError):  # it had no time to make its group
        os.killpg(child, signal.SIGKILL)  # without a PID namespace, what it left would keep `reply` open
    os.kill(child, signal.SIGKILL)  # the first of a PID namespace: the kernel kills all that are left in it
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(TIMED_OUT if not in_time else status if status >= 0 else KILLED - status)


def _unshare() -> bool:
    """Namespaces of its own for users, mounts, processes, network and IPC; root needs none for users."""
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEWNS | _NEWPID | _NEWNET | _NEWIPC | (_NEWUSER if user else 0)) != 0:
        return False
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
            except OSError:
                return False
    return True


def _shut_in(asked: dict[str, Any], user: int, apart: bool) -> list[str]:
    """Leaves root, other files and all rights behind. Returns the layers that this kernel or container refuses."""
    missing = [] if apart else ["namespaces"]
    libraries = [*_SYSTEM, f"{sys.base_prefix}/lib", *([f"{sys.prefix}/lib"] if asked["site_packages"] else [])]
    if apart:
        try:
            _new_root(libraries, asked["limits"]["disk"])
        except OSError:
            missing.append("mounts")
    if os.getuid() == 0:
        os.chown(".", user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    die_with_parent()  # forgotten by the kernel when the user changes
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(
            f"{os.__file__} cannot be read by another user than root: set `command` to a Python that can"
        )
    if not restrict_files(read=[*libraries, *_DEVICES], write=[".", os.devnull]):
        missing.append("landlock")
    return missing


def _new_root(libraries: list[str], disk: int) -> None:
    """Moves to WORK, in a root folder in memory that has nothing else but the libraries, read-only."""
    root = os.getcwd()
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", 0, f"size={disk},nr_inodes=10000,mode=755")
    for path in dict.fromkeys([*libraries, *_DEVICES]):
        inside = root + path
        if os.path.islink(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
            _mount(path, inside, None, _MS_BIND | _MS_REC)
            _mount("none", inside, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | os.statvfs(inside).f_flag & _MS_LOCKED)
        elif os.path.exists(path):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.close(os.open(inside, os.O_CREAT))
            _mount(path, inside, None, _MS_BIND)
    os.mkdir(root + WORK)
    os.chroot(root)
    os.chdir(WORK)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    if _LIBC.mount(source.encode(), target.encode(), kind and kind.encode(), flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def _limit(limits: dict[str, int], *, alone: bool) -> None:
    """`alone`: no other program has this user, so that its processes can be counted. Threads count as processes."""
    limit("AS", limits["memory"])
    limit("CPU", int(limits["seconds"]) + 1)
    limit("FSIZE", limits["disk"])
    limit("NOFILE", 64)
    limit("CORE", 0)
    if alone:
        limit("NPROC", limits["processes"])


def _run(program: str, tests: list[str]) -> dict[str, Any]:
    """Runs the program as the module `answer`, then each test in it; the first error, and how many tests passed.

    Tests that are no Python say nothing of the program: they are what `failed`.
    """
    module = sys.modules["answer"] = types.ModuleType("answer")
    try:
        codes = [compile(_Asserting().visit(ast.parse(test, "tests.py")), "tests.py", "exec") for test in tests]
    except Exception as wrong:
        fix = "a test is a line such as `assert add(1, 2) == 3`"
        return {"failed": f"the tests are no Python: {_told(wrong, '')}; {fix}"}
    passed, error = 0, ""
    for number, source in enumerate([program, *tests]):
        try:
            exec(codes[number - 1] if number else compile(source, "answer.py", "exec"), module.__dict__)
            passed += number > 0
        except BaseException as raised:  # SystemExit is no way to pass
            error = error or _told(raised, source if number else "")
            if number == 0:
                break
    return {"passed": passed, "error": error}


class _Asserting(ast.NodeTransformer):
    """Asserts the bare expressions of a test: a comparison must be true, and what is called must not return False."""

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return node  # its helpers may ignore what they call
        return super().visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        test = node.value
        if isinstance(test, ast.Call):
            test = ast.Compare(test, [ast.IsNot()], [ast.Constant(False)])
        elif not isinstance(test, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp)):
            return node
        return ast.fix_missing_locations(ast.copy_location(ast.Assert(test), node))


def _told(raised: BaseException, test: str) -> str:
    """An error in words, after the line of the test that met it."""
    words = f"{type(raised).__name__}: {raised}".removesuffix(": ")[:300]
    at, lines = raised.__traceback__, test.splitlines()
    while at and at.tb_frame.f_code.co_filename != "tests.py":
        at = at.tb_next
    line = lines[at.tb_lineno - 1].strip()[:200] if at and at.tb_lineno <= len(lines) else ""
    return f"{line}: {words}" if line else words


if __name__ == "__main__":
    main()
