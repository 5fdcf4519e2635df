"""A wheelhouse: all that a machine without network needs, in one folder. Collects one; unpacks one for setup_venv.py.

    python setup_wheelhouse.py FOLDER [--part 60M] [--python 3.12] [--cuda] [--exclude NAME …] [--model REFERENCE …]

FOLDER gets `manifest.json` (what is there, and the SHA-256 of each file), `distillate.bundle` (this repository; `git
clone` reads it) and `part-000`, `part-001`, …: one tar archive of wheels and models, cut. uv decides which versions fit
constraints.txt on the machine that is meant, pip downloads them. Unpacking needs the standard library only.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from setup_venv import GROUPS, UNWANTED

ROOT = Path(__file__).resolve().parent
MANIFEST, BUNDLE = "manifest.json", "distillate.bundle"
COLLECTED = ["base", "train", "serve", "review", "dev"]  # groups of setup_venv.py
GLIBC = 34  # wheels for glibc 2.34 and older (RHEL 9, Ubuntu 22.04, Debian 12): the oldest that all packages run on
BLOCK = 1 << 20


class WheelhouseError(Exception):
    """One line for the user."""


# --- files in parts ---


class PartWriter:
    """Writes a stream as part-000, part-001, … of `size` bytes, the last one shorter."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.parts: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if self.file is None or self.file.tell() == self.size:
                self.close()
                self.file = (self.folder / f"part-{len(self.parts):03}").open("wb")
            done = self.file.write(view[: self.size - self.file.tell()])
            view = view[done:]
        return len(data)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.parts.append(described(Path(self.file.name)))


class PartReader:
    """Reads parts as the one stream that they were."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = iter(paths)
        self.file: IO[bytes] = BytesIO()

    def read(self, size: int) -> bytes:
        while not (data := self.file.read(size)) and (path := next(self.paths, None)):
            self.file.close()
            self.file = path.open("rb")
        return data


def described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises WheelhouseError if there is none."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise WheelhouseError(f"{folder} is no wheelhouse: {MANIFEST}: {error}; make one: make wheelhouse") from None
    return manifest


def verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises WheelhouseError that names the missing and damaged files."""
    wrong = []
    for file in manifest["files"]:
        path = folder / file["name"]
        if not path.is_file():
            wrong.append(f"{file['name']} is missing")
        elif path.stat().st_size != file["bytes"]:
            wrong.append(f"{file['name']} has {path.stat().st_size:,} bytes instead of {file['bytes']:,}")
        elif described(path) != file:
            wrong.append(f"{file['name']} is damaged (its SHA-256 is another)")
    if wrong:
        raise WheelhouseError(f"{folder}: {'; '.join(wrong)}; copy {'them' if wrong[1:] else 'it'} again")


def unpack(folder: str, into: str, python: str) -> dict[str, Any]:
    """The wheels and models of a wheelhouse, verified, into a new folder. Returns its manifest.

    Raises WheelhouseError if a file is missing or damaged, or the wheels are for another Python (`python` is the
    version that .venv has) or processor.
    """
    source = Path(folder).expanduser()
    manifest = read_manifest(source)
    meant, here = (manifest["python"], manifest["machine"]), (minor(python), platform.machine())
    if meant != here:
        raise WheelhouseError(
            "{} is for Python {} on {}; .venv has Python {} on {} (for another Python: `make clean`, then make setup "
            "with PYTHON=…)".format(source, *meant, *here)
        )
    verify(source, manifest)
    shutil.rmtree(into, ignore_errors=True)
    parts = [source / file["name"] for file in manifest["files"] if file["name"] != BUNDLE]
    with tarfile.open(fileobj=PartReader(parts), mode="r|", bufsize=BLOCK) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not in Python 3.11.0 to 3.11.3
        archive.extractall(into)
    return manifest


def minor(version: str) -> str:
    """`3.11` of `3.11.7`."""
    return ".".join(version.split(".")[:2])


def place_models(unpacked: str) -> list[Path]:
    """Moves the models to where they are looked for. What is there already stays. Returns their folders."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    cache = os.environ.get("DISTILL_CACHE") or "~/.cache/distillate"  # as pipeline.models says
    placed = []
    for kind, place in {"embedded": cache, "hub": hub, "models": ROOT / "models"}.items():
        for source in sorted(Path(unpacked, kind).glob("*")):
            target = Path(place).expanduser() / source.name
            placed.append(target)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                building = target.with_name(f"{target.name}.tmp")  # a move to another file system is a copy
                shutil.rmtree(building, ignore_errors=True)  # of a call that was cut short
                shutil.move(source, building)
                building.rename(target)
    return placed


# --- collecting ---


def main() -> None:
    parser = argparse.ArgumentParser(description="Collects wheels, models and the repository in a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", type=part_size, default="2G", help="size of a part: 60M, 2G (the default)")
    parser.add_argument("--python", default=platform.python_version(), help="the other machine's Python, 3.11 to 3.14")
    parser.add_argument("--machine", default=platform.machine(), help="the other machine's processor: x86_64, aarch64")
    parser.add_argument("--cuda", action="store_true", help="torch and vLLM for NVIDIA GPUs instead of CPUs")
    parser.add_argument("--groups", nargs="+", choices=[*COLLECTED, "ray"], default=COLLECTED, help="what to set up")
    parser.add_argument("--exclude", nargs="+", default=[], help="packages to leave out")
    parser.add_argument("--model", nargs="+", default=[], help="embedded:<name>, a model folder, or a Hub id")
    parser.add_argument("--dry-run", action="store_true", help="print the packages; download nothing")
    options = parser.parse_args()
    options.folder, options.python = options.folder.expanduser().resolve(), minor(options.python)
    try:
        if not options.dry_run:
            check_clone()
        wanted = resolved(options)
        if options.dry_run:
            print("\n".join(wanted))
        else:
            collect(options, wanted)
    except WheelhouseError as error:
        sys.exit(f"wheelhouse failed: {error}")
    except OSError as error:  # a full disk, a folder that may not be written
        from pipeline.errors import file_error

        sys.exit(f"wheelhouse failed: {file_error(error, str(options.folder))}")
    except KeyboardInterrupt:
        print("wheelhouse interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def check_clone() -> None:
    """Raises WheelhouseError unless this is a clone with its whole history: another one's bundle cannot be cloned."""
    command = ["git", "rev-parse", "--is-shallow-repository", "--show-toplevel"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise WheelhouseError("git is not installed; the wheelhouse gets a bundle of this repository") from None
    shallow, _, top = done.stdout.strip().partition("\n")
    if done.returncode or Path(top) != ROOT:
        reason = done.stderr.strip() or f"the repository is {top}"
        raise WheelhouseError(f"{ROOT} is no clone ({reason}); run this in a `git clone` of the repository")
    if shallow == "true":
        raise WheelhouseError(f"{ROOT} is a shallow clone; fetch its history first: git fetch --unshallow")


def part_size(text: str) -> int:
    """Bytes of `60M` or `2G`."""
    found = re.fullmatch(r"(\d+)([KMG])", text.upper())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text}: a number with K, M or G, as 60M")
    return int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]]


def resolved(options: argparse.Namespace) -> list[str]:
    """The packages that the groups need on the other machine, each with its version: `name==1.2`."""
    constraints = ROOT / "constraints.txt"
    groups = [f"{group}-cpu" if group == "serve" and not options.cuda else group for group in options.groups]
    extras = [extra for group in groups for extra in GROUPS[group]["extras"]]
    more = ["setuptools"]  # builds this project
    if not options.cuda:
        torch = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
        more += [f"{line}+cpu" for line in torch if {"train", "serve-cpu"} & set(groups)]
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:"]
    command += ["--python-version", options.python, "--python-platform", f"{options.machine}-manylinux_2_{GLIBC}"]
    command += ["-c", str(constraints), *(part for extra in extras for part in ("--extra", extra))]
    command += ["--index-strategy", "unsafe-best-match", *torch_index(options, "--index")]
    lines = run([sys.executable, "-m", *command, str(ROOT / "pyproject.toml"), "-"], input="\n".join(more)).splitlines()
    wanted = {normalised(line.split("==")[0]): line for line in lines if "==" in line}
    unknown = [name for name in options.exclude if normalised(name) not in wanted]
    if unknown:
        raise WheelhouseError(f"EXCLUDE: the packages have no {', '.join(unknown)}; --dry-run lists their names")
    excluded = {*map(normalised, options.exclude), *([] if options.cuda else UNWANTED)}
    return [line for name, line in wanted.items() if name not in excluded]


def torch_index(options: argparse.Namespace, flag: str) -> list[str]:
    """Where the CPU build of torch is, if the package index does not have it: the variable that `make setup` reads."""
    url = os.environ.get("TORCH_INDEX_URL")
    return [flag, url] if url and not options.cuda and {"train", "serve"} & set(options.groups) else []


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def collect(options: argparse.Namespace, wanted: list[str]) -> None:
    """Downloads, packs and describes all, and only then replaces a wheelhouse that is there.

    What a call that was cut short has downloaded is used by the next.
    """
    folder: Path = options.folder
    work, new = folder / "collecting", folder / "collecting/new"
    models = model_folders(options.model)
    shutil.rmtree(new, ignore_errors=True)
    for path in (work / "wheels", new):
        path.mkdir(parents=True, exist_ok=True)
    say(f"downloading {len(wanted)} packages for Python {options.python} on {options.machine}")
    download(options, wanted, work)
    say("packing")
    writer = PartWriter(new, options.part)
    with tarfile.open(fileobj=writer, mode="w|", bufsize=BLOCK) as archive:
        for name in ("requirements.txt", "wheels"):
            archive.add(work / name, name)
        for kind, source in models:
            archive.dereference = kind != "hub"  # whose links stay within the model's folder
            archive.add(source, f"{kind}/{source.name}")
    writer.close()
    branch = run(["git", "rev-parse", "--abbrev-ref", "HEAD"]).strip()
    run(["git", "bundle", "create", "-q", str(new / BUNDLE), *dict.fromkeys(["HEAD", branch])])
    asked = {name: getattr(options, name) for name in ("python", "machine", "cuda", "groups", "exclude", "model")}
    files = [described(new / BUNDLE), *writer.parts]
    manifest = {"commit": run(["git", "rev-parse", "HEAD"]).strip(), **asked, "packages": wanted, "files": files}
    (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    replace_wheelhouse(folder, new)
    shutil.rmtree(work)
    size = sum(file["bytes"] for file in files) / 2**20
    say(f"{folder}: {len(wanted)} packages, {len(models)} models, {len(writer.parts)} parts, {size:,.0f} MiB")


def replace_wheelhouse(folder: Path, new: Path) -> None:
    """Moves the new files in, the manifest last, and removes the others of the old wheelhouse. Further files stay."""
    try:
        old = {file["name"] for file in read_manifest(folder)["files"]}
    except (WheelhouseError, KeyError, TypeError):  # none is there
        old = set()
    names = {path.name for path in new.iterdir()}
    for name in sorted(names, key=lambda name: name == MANIFEST):
        (new / name).replace(folder / name)
    for name in old - names:
        (folder / name).unlink(missing_ok=True)


def download(options: argparse.Namespace, wanted: list[str], work: Path) -> None:
    """The packages' wheels, into work/wheels; their list, into work/requirements.txt."""
    # `===` names one build: `==2.13.0` would also take 2.13.0+cpu.
    (work / "requirements.txt").write_text("".join(line.replace("==", "===", 1) + "\n" for line in wanted))
    names = [f"manylinux_2_{glibc}" for glibc in range(GLIBC, 4, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]
    command = ["pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", options.python]
    command += [part for name in names for part in ("--platform", f"{name}_{options.machine}")]
    command += [*torch_index(options, "--extra-index-url"), "--dest", str(work / "wheels")]
    run([sys.executable, "-m", *command, "-r", str(work / "requirements.txt")])


def model_folders(references: list[str]) -> list[tuple[str, Path]]:
    """model_folder of each. Raises WheelhouseError if two of them would be one folder on the other machine."""
    models: dict[tuple[str, str], Path] = {}
    for reference in references:
        kind, source = model_folder(reference)
        first = models.setdefault((kind, source.name), source)
        if first.resolve() != source.resolve():
            raise WheelhouseError(f"{first} and {source} would both be {kind}/{source.name}; rename one of them")
    return [(kind, source) for (kind, _), source in models.items()]


def model_folder(reference: str) -> tuple[str, Path]:
    """Where the model is kept on the other machine (a key of place_models) and its folder here."""
    from pipeline.errors import DistillError
    from pipeline.models import PREFIX, resolve_model

    try:
        folder = resolve_model(reference)
        if Path(folder).is_dir():
            return "embedded" if reference.startswith(PREFIX) else "models", Path(folder)
        from huggingface_hub import snapshot_download

        return "hub", Path(snapshot_download(reference)).parents[1]  # <model>/snapshots/<commit>
    except (DistillError, OSError, ValueError) as error:
        raise WheelhouseError(str(error)) from None


def run(command: list[str], input: str = "") -> str:
    """What a command prints; its errors go to the terminal."""
    done = subprocess.run(command, cwd=ROOT, input=input, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise WheelhouseError(f"`{' '.join(command[:5])} …` failed; its reason is above")
    return done.stdout


def say(text: str) -> None:
    print(f"wheelhouse: {text}", flush=True)


if __name__ == "__main__":
    main()
