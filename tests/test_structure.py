"""The structure that DESIGN promises: who imports whom, what stays light, who owns the package names."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

# A package and the ones of ours it may import. `chain` is the top: it may import all; so may
# `benchmarks`, which is run from the root and not installed.
MAY_IMPORT = {
    "pipeline": set(),
    "serve": {"pipeline"},
    "generate": {"pipeline"},
    "filters": {"generate", "pipeline"},
    "train": {"generate", "pipeline"},
    "evaluate": {"filters", "generate", "serve", "pipeline"},  # serve: it times models on the engine they run on
    "chat": {"generate", "pipeline", "serve"},
    "experiments": {"chain", "evaluate", "filters", "generate", "pipeline", "serve", "train"},
    "chain": {"evaluate", "filters", "generate", "pipeline", "serve", "train"},
    "scale": {"filters", "generate", "pipeline", "serve", "train"},
    "benchmarks": {"chain", "evaluate", "experiments", "filters", "generate", "pipeline", "scale", "serve", "train"},
}
INSTALLED = sorted(MAY_IMPORT.keys() - {"benchmarks"})
ON_A_CLUSTER = {"scale"}  # what a command line imports in a function, when it is asked for
HEAVY = {"accelerate", "datasets", "obstore", "peft", "ray", "torch", "transformers", "trl", "vllm"}
ROOT = Path(__file__).parents[1]


def imports_of(package: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found.add(node.module.split(".")[0])
    return found


def top_imports_of(package: str) -> set[str]:
    """Those that are not in a function."""
    nodes = [node for path in (ROOT / package).rglob("*.py") for node in ast.parse(path.read_text("utf-8")).body]
    return {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    ours = imports_of(package) & set(MAY_IMPORT) - {package}
    if package in ("filters", "generate", "serve", "train"):
        ours -= ON_A_CLUSTER - top_imports_of(package)
    assert ours <= MAY_IMPORT[package]


def test_the_client_and_the_filters_stay_light() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("pipeline", "generate", "filters", "serve", "chain", "chat", "experiments", "scale")
        for path in (ROOT / package).rglob("*.py")
    ]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"generate", "filters"} <= loaded
    assert not loaded & HEAVY


def test_every_command_can_say_which_extra_is_missing() -> None:
    """It starts with what `make generate` has installed, and imports the packages of an extra when it needs them."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    always = {_normalised(re.split(r"[\[=<>;\s]", line)[0]) for line in needed}
    imported = {module for package in INSTALLED for module in imports_of(package)}
    known = packages_distributions()
    extra = [
        name for name in imported & known.keys() - set(MAY_IMPORT) if always.isdisjoint(map(_normalised, known[name]))
    ]
    stages = set(re.findall(r"\$\(PY\) -m ([\w.]+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    ours = [name for name in stages if name.split(".")[0] in INSTALLED]
    modules = [f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name for name in ours]
    code = f"import importlib, sys\nsys.modules.update(dict.fromkeys({extra!r}))\n"
    code += f"for name in {modules!r}: importlib.import_module(name)"
    assert {"torch", "ray", "fastapi"} <= set(extra) and {"train.__main__", "chat.__main__"} <= set(modules)
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


@pytest.mark.parametrize("package", INSTALLED)
def test_each_package_name_is_ours(package: str) -> None:
    assert set(packages_distributions()[package]) == {"distillate"}


def test_every_package_that_is_imported_is_declared() -> None:
    """A package that only comes with another one can go away with it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {_normalised(re.split(r"[\[=<>;\s]", line)[0]) for group in groups for line in group}
    known = packages_distributions()
    undeclared = {
        module: sorted(known.get(module, ["not installed"]))
        for package in INSTALLED  # the benchmarks also measure packages that are not needed
        for module in imports_of(package) - set(MAY_IMPORT) - sys.stdlib_module_names
        if not declared & {_normalised(name) for name in known.get(module, [module])}
    }
    assert undeclared == {}


def _normalised(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_files_stay_small() -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path: size for path, size in sizes.items() if size > 400} == {}


def test_functions_fit_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []
