"""A wheelhouse of small files: cut in parts, verified, put together; and installed by the set-up, with no index."""

import argparse
import errno
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
house = SimpleNamespace(**runpy.run_path(str(ROOT / "setup_wheelhouse.py")))
HERE = platform.python_version()


def a_wheel(folder: Path, name: str, needs: str = "") -> None:
    """A wheel of one empty module."""
    info, metadata = f"{name}-1.0.dist-info", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {needs}\n" if needs else ""))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def a_wheelhouse(tmp_path: Path, *, size: int = 1000, **changes: Any) -> Path:
    """As collect() writes it, of the files in `content`."""
    content, folder = tmp_path / "content", tmp_path / "house"
    for name in ("wheels", "models/mine", "embedded/tiny"):
        (content / name).mkdir(parents=True, exist_ok=True)
    (content / "requirements.txt").touch()
    (content / "models/mine/config.json").write_bytes(os.urandom(2500))
    (content / "embedded/tiny/config.json").write_text("{}")
    folder.mkdir()
    writer = house.PartWriter(folder, size)
    with tarfile.open(fileobj=writer, mode="w|") as archive:
        for path in sorted(content.iterdir()):
            archive.add(path, path.name)
    writer.close()
    here = {"python": house.minor(HERE), "machine": platform.machine()}
    manifest = {**here, "cuda": False, "groups": [], "packages": [], "files": writer.parts, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("size", [1000, 10_240, 1 << 20])
def test_what_was_cut_in_parts_is_put_together(tmp_path: Path, size: int) -> None:
    folder = a_wheelhouse(tmp_path, size=size)
    sizes = [path.stat().st_size for path in sorted(folder.glob("part-*"))]
    assert all(own == size for own in sizes[:-1]) and 0 < sizes[-1] <= size
    house.unpack(str(folder), str(tmp_path / "out"), HERE)
    for path in ("models/mine/config.json", "embedded/tiny/config.json"):
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "content" / path).read_bytes()


def test_missing_and_damaged_parts_are_named_in_one_line(tmp_path: Path) -> None:
    folder = a_wheelhouse(tmp_path)
    (folder / "part-001").unlink()
    (folder / "part-003").write_bytes(b"short")
    bytes_of = bytearray((folder / "part-004").read_bytes())
    bytes_of[500] ^= 1
    (folder / "part-004").write_bytes(bytes_of)
    with pytest.raises(house.WheelhouseError) as error:
        house.unpack(str(folder), str(tmp_path / "out"), HERE)
    assert str(error.value) == (
        f"{folder}: part-001 is missing; part-003 has 5 bytes instead of 1,000; "
        "part-004 is damaged (its SHA-256 is another); copy them again"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"python": "3.9"}, "is for Python 3.9 on .*`make clean`"), ({"machine": "vax"}, " on vax; .venv has Python 3")],
)
def test_another_machine_is_told_so(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(house.WheelhouseError, match=message):
        house.unpack(str(a_wheelhouse(tmp_path, **changes)), str(tmp_path / "out"), HERE)


def test_the_python_of_the_environment_that_is_there_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier call with another PYTHON has made it, and pip installs for that one."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.9.2\n")
    python.chmod(0o755)
    setup = runpy.run_path(str(ROOT / "setup_venv.py"))["install_wheelhouse"]
    said: list[str] = []

    def fail(text: str) -> None:
        said.append(text)
        raise SystemExit

    for name, value in {"VENV": str(tmp_path), "VENV_PYTHON": str(python), "fail": fail}.items():
        monkeypatch.setitem(setup.__globals__, name, value)
    with pytest.raises(SystemExit):
        setup(str(a_wheelhouse(tmp_path)))
    assert f"is for Python {house.minor(HERE)} on " in said[0] and "; .venv has Python 3.9 on " in said[0]


def test_a_folder_that_is_none_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(house.WheelhouseError, match=r"is no wheelhouse: manifest\.json: .*make wheelhouse"):
        house.unpack(str(tmp_path), str(tmp_path / "out"), HERE)


def test_models_come_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in (("DISTILL_CACHE", "cache"), ("HF_HUB_CACHE", "hub")):
        monkeypatch.setenv(name, str(tmp_path / place))
    monkeypatch.setitem(house.place_models.__globals__, "ROOT", tmp_path / "clone")
    for kind in ("embedded", "hub", "models"):
        (tmp_path / "out" / kind / "one").mkdir(parents=True)
    (tmp_path / "cache/one/mine").mkdir(parents=True)  # what is there stays
    assert house.place_models(str(tmp_path / "out")) == [
        tmp_path / "cache/one", tmp_path / "hub/one", tmp_path / "clone/models/one",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "cache/one").iterdir()] == ["mine"]
    assert (tmp_path / "clone/models/one").is_dir()


def test_a_model_that_was_half_copied_is_copied_whole_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    source, names = tmp_path / "out/embedded/one", ["config.json", "model.safetensors"]
    source.mkdir(parents=True)
    for name in names:
        (source / name).write_text(name)

    def across(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    copies: list[Any] = []
    copy2 = shutil.copy2

    def full(*given: Any, **more: Any) -> Any:
        copies.append(given)
        if len(copies) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy2(*given, **more)

    rename = os.rename
    for failing in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda old, new: across() if Path(old) == source else rename(old, new))
            if failing:
                patch.setattr(shutil.move, "__defaults__", (full,))  # in place of copy2
                with pytest.raises(shutil.Error, match="No space left"):
                    house.place_models(str(tmp_path / "out"))
                assert not (tmp_path / "cache/one").exists()
            else:
                assert house.place_models(str(tmp_path / "out")) == [tmp_path / "cache/one"]
    assert sorted(path.name for path in (tmp_path / "cache/one").iterdir()) == names
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["one"]


def options_of(folder: Path, *models: Path | str) -> argparse.Namespace:
    folder.mkdir(exist_ok=True)
    asked = {"python": "3.11", "machine": "x86_64", "cuda": False, "groups": ["base"], "exclude": []}
    return argparse.Namespace(folder=folder, part=1 << 20, model=[str(model) for model in models], **asked)


@pytest.mark.parametrize(
    ("groups", "cuda", "asks"),
    [
        (["base", "ray"], False, False),
        (["base", "train"], False, True),
        (["serve"], False, True),
        (["train"], True, False),
    ],
)
def test_the_index_of_torch_is_asked_only_for_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[str], cuda: bool, asks: bool
) -> None:
    """It may be out of reach where packages are."""
    monkeypatch.setenv("TORCH_INDEX_URL", "https://torch.example/cpu")
    options = options_of(tmp_path / "house")
    options.groups, options.cuda = groups, cuda
    assert house.torch_index(options, "--index") == (["--index", "https://torch.example/cpu"] if asks else [])


def test_a_misspelt_package_to_leave_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(tmp_path / "house")
    monkeypatch.setitem(house.resolved.__globals__, "run", lambda command, input="": "aiohttp==3.1\nMarkup_Safe==2.0\n")
    options.exclude = ["markup-safe"]
    assert house.resolved(options) == ["aiohttp==3.1"]
    options.exclude = ["aiohttp", "markup-safee"]
    with pytest.raises(house.WheelhouseError, match=r"^EXCLUDE: the packages have no markup-safee; "):
        house.resolved(options)


def test_an_interrupted_collection_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for name, value in {"check_clone": lambda: None, "resolved": interrupted}.items():
        monkeypatch.setitem(house.main.__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["setup_wheelhouse.py", str(tmp_path / "house")])
    with pytest.raises(SystemExit) as end:
        house.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "wheelhouse interrupted: run the same command again to go on\n"


@pytest.mark.parametrize("kind", ["full", "file"])
def test_a_disk_that_takes_no_wheelhouse_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "house"

    def resolved(_: argparse.Namespace) -> list[str]:
        if kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` raises it: it names no file
        folder.touch()
        return []

    for name, value in {"check_clone": lambda: None, "resolved": resolved}.items():
        monkeypatch.setitem(house.main.__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["setup_wheelhouse.py", str(folder)])
    said = {"full": "house: No space left on device", "file": "house/collecting/wheels: Not a directory"}[kind]
    with pytest.raises(SystemExit, match=rf"^wheelhouse failed: .*{said}$"):
        house.main()


def test_a_wheelhouse_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_wheelhouse(tmp_path)  # of more parts than the new one
    own = folder / "part-time contracts.txt"
    own.write_text("mine")

    def run(command: list[str], input: str = "") -> str:
        if command[1] == "bundle":
            Path(command[4]).write_bytes(b"bundle")
        return "main\n"

    def download(options: argparse.Namespace, wanted: list[str], work: Path) -> None:
        (work / "requirements.txt").touch()
        if not wanted:
            raise house.WheelhouseError("no network")

    for name, value in {"run": run, "download": download}.items():
        monkeypatch.setitem(house.collect.__globals__, name, value)
    options = options_of(folder)
    with pytest.raises(house.WheelhouseError, match="no network"):
        house.collect(options, [])
    assert house.read_manifest(folder)["packages"] == []
    house.verify(folder, house.read_manifest(folder))
    house.collect(options, ["six==1.0"])
    assert house.read_manifest(folder)["packages"] == ["six==1.0"]
    house.verify(folder, house.read_manifest(folder))
    expected = ["distillate.bundle", "manifest.json", "part-000", own.name]
    assert sorted(path.name for path in folder.iterdir()) == expected and own.read_text() == "mine"
    (folder / "manifest.json").write_text('{"name": "an app"}')  # no wheelhouse's
    house.collect(options, ["six==1.0"])
    house.verify(folder, house.read_manifest(folder))


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    models = [tmp_path / "runs" / run / "student" for run in "ab"]
    for model in models:
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    with pytest.raises(house.WheelhouseError, match=r"runs/a/student and .*/b/student would both be models/student"):
        house.collect(options_of(tmp_path / "house", *models), [])


def test_a_mistyped_model_leaves_the_wheelhouse_that_was_there(tmp_path: Path) -> None:
    folder = a_wheelhouse(tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(house.WheelhouseError, match="no-such-model"):
        house.collect(options_of(folder, "./no-such-model"), [])
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == before


@pytest.mark.parametrize(
    ("kind", "said"),
    [("shallow", r"is a shallow clone; fetch its history first: git fetch --unshallow$"), ("copy", "is no clone ")],
)
def test_what_cannot_be_bundled_is_said_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    whole, here = tmp_path / "whole", tmp_path / kind
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(whole)]
    subprocess.run(["git", "init", "-q", str(whole)], check=True)
    for _ in range(2):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    if kind == "shallow":
        subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{whole}", str(here)], check=True)
    else:
        here = whole / kind  # in another repository, whose bundle would be made
        here.mkdir()
    asked: list[Any] = []
    changed = {"ROOT": here, "resolved": asked.append, "collect": lambda options, wanted: None}
    for name, value in changed.items():
        monkeypatch.setitem(house.main.__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["setup_wheelhouse.py", str(tmp_path / "house")])
    with pytest.raises(SystemExit, match=said):
        house.main()
    assert asked == []
    monkeypatch.setitem(house.main.__globals__, "ROOT", whole)
    house.main()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("60M", 60 << 20), ("2g", 2 << 30), ("0M", None), ("60", None), ("M", None)]
)
def test_the_size_of_a_part(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(Exception, match="a number with K, M or G"):
            house.part_size(text)
    else:
        assert house.part_size(text) == size


BACKEND = """
import zipfile
def build_editable(folder, settings=None, metadata=None):
    with zipfile.ZipFile(folder + "/clone-1-py3-none-any.whl", "w") as archive:
        archive.writestr("clone-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: clone\\nVersion: 1\\n")
        archive.writestr("clone-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("clone-1.dist-info/RECORD", "")
    return "clone-1-py3-none-any.whl"
"""


@pytest.mark.timeout(400)  # it makes a virtual environment
def test_the_set_up_installs_from_a_wheelhouse_without_an_index(tmp_path: Path) -> None:
    """Packages that need another, which was left out; and this project, built by what the wheelhouse has."""
    clone, content = tmp_path / "clone", tmp_path / "content"
    clone.mkdir(), (content / "wheels").mkdir(parents=True)
    for name in ("Makefile", "setup_venv.py", "setup_wheelhouse.py"):
        shutil.copy(ROOT / name, clone)
    project = '[project]\nname = "clone"\nversion = "1"\n'
    (clone / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["setuptools"]\nbuild-backend = "backend"\nbackend-path = ["."]\n{project}'
    )
    (clone / "backend.py").write_text(BACKEND)
    a_wheel(content / "wheels", "setuptools")
    modules = runpy.run_path(str(ROOT / "setup_venv.py"))["GROUPS"]["base"]["imports"]
    for name in modules:
        a_wheel(content / "wheels", name, needs="left-out")
    (content / "requirements.txt").write_text("".join(f"{name}===1.0\n" for name in modules))
    folder = a_wheelhouse(tmp_path, groups=["base"])
    command = ["make", "setup", f"WHEELHOUSE={folder}", f"PYTHON={sys.executable}"]
    offline = os.environ | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "DISTILL_CACHE": str(tmp_path / "cache")}

    done = subprocess.run(command, cwd=clone, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"model {clone}/models/mine" in done.stdout
    assert (clone / ".venv/.ready-base").is_file() and not (clone / ".venv/wheelhouse").exists()

    (folder / "part-002").unlink()
    done = subprocess.run(command, cwd=clone, env=offline, capture_output=True, text=True)
    assert done.returncode and f"set-up failed: {folder}: part-002 is missing; copy it again" in done.stderr
