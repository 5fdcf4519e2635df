"""An adapter merged for engines: once, whole, and again when the folder is not whole."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline import adapters
from pipeline.adapters import MERGED_FROM, missing_weights, torn_file, whole_model

INDEX = '{"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}'
FILES = ["config.json", MERGED_FROM, "model.safetensors"]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The merges that were begun. Each takes a while between its files."""
    begun: list[Path] = []

    def merge(base: str | Path, adapter: Path, target: Path) -> None:
        begun.append(target)
        (target / "config.json").write_text("{}")
        time.sleep(0.5)
        save_file({"w": np.zeros(2)}, target / "model.safetensors")

    monkeypatch.setattr(adapters, "merge_adapter", merge)
    return begun


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_commands_at_once_merge_once(adapter: Path, tmp_path: Path, merges: list[Path]) -> None:
    merged = tmp_path / "evaluation/merged"
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(whole_model, adapter, "base", merged) for _ in range(2)]
        assert [one.result() for one in both] == [merged, merged]
    assert len(merges) == 1 and names(merged) == FILES


def test_a_merged_folder_without_a_model_is_made_again(adapter: Path, tmp_path: Path, merges: list[Path]) -> None:
    merged = whole_model(adapter, "base", tmp_path / "merged")
    made_of = json.loads((merged / MERGED_FROM).read_bytes())
    assert whole_model(adapter, "base", merged) == merged and len(merges) == 1
    for again, file in enumerate(("config.json", "model.safetensors"), start=2):
        (merged / file).unlink()
        assert whole_model(adapter, "base", merged) == merged and len(merges) == again
    assert names(merged) == FILES and json.loads((merged / MERGED_FROM).read_bytes()) == made_of


def test_a_base_with_other_weights_is_merged_again(adapter: Path, tmp_path: Path, merges: list[Path]) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    for value in (0, 1):
        save_file({"w": np.full(2, value)}, base / "model.safetensors")  # of one size
        for _ in range(2):
            whole_model(adapter, base, merged)
    assert len(merges) == 2


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ({}, None),
        ({"config.json": "{}"}, "model.safetensors"),
        ({"config.json": "{}", "model.safetensors": ""}, None),
        ({"adapter_config.json": "{}", "model.safetensors": ""}, "adapter_model.safetensors"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, None),
        ({"config.json": "{}", "model.safetensors.index.json": INDEX, "a.safetensors": ""}, "b.safetensors"),
        ({"model.safetensors.index.json": INDEX, "a.safetensors": "", "b.safetensors": ""}, None),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path: Path, there: dict[str, str], missing: str | None) -> None:
    for name, content in there.items():
        (tmp_path / name).write_text(content)
    assert missing_weights(tmp_path) == (tmp_path / missing if missing else None)


@pytest.mark.parametrize("name", FILES)
def test_a_merged_folder_with_an_empty_file_is_made_again(
    name: str, adapter: Path, tmp_path: Path, merges: list[Path]
) -> None:
    merged = whole_model(adapter, "base", tmp_path / "merged")
    (merged / name).write_bytes(b"")  # a power cut
    assert whole_model(adapter, "base", merged) == merged and len(merges) == 2
    assert torn_file(merged) is None
