"""A student as a GGUF file: read back, answered by llama.cpp as by transformers, and the Modelfile."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGUFReader

import train.publish.to_gguf
from pipeline.errors import DistillError, UsageError
from pipeline.models import ADAPTER
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from tests.tiny_student import CHATML, kept_row, make_recipe, make_run, tiny_model, tiny_tokenizer
from train.publish.export import export_gguf
from train.publish.ollama import chat_form, modelfile, not_carried_over
from train.publish.to_gguf import check_type, write_gguf
from train.run import train_run

WORDS = ["Toby says hello.", "Dudu eats honey.", "Mimi sleeps all day."]
# As Qwen2.5's: a system message of its own where the conversation has none.
DEFAULTING = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
TAGGED = (  # as Llama's: the first token, and no mark before an answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ '<<' + m.content + '>>' }}{% endif %}"
    "{% endfor %}"
)
FOLDED = "{% for m in messages %}{{ loop.index ~ m.role ~ ':' ~ m.content ~ '\n' }}{% endfor %}"  # it counts turns
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML


def small_model(folder: Path) -> Path:
    """The tiny model with a few merges, without which llama.cpp takes no tokenizer; rows of 64, as q8_0 needs."""
    tiny_model(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    vocabulary, merges = tokenizer["model"]["vocab"], [["a", "y"], ["l", "l"], ["Ġ", "s"]]
    rare = ["\u0100", "\u0101", "\u0102"]  # bytes that no test says: their places are the merged tokens'
    for (left, right), old in zip(merges, rare, strict=True):
        vocabulary[left + right] = vocabulary.pop(old)
    tokenizer["model"]["merges"] = merges
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    """A student that says one of three things for sure, as an adapter."""
    student = small_model(tmp_path_factory.mktemp("models") / "Small-Chat")
    settings = json.loads((student / "generation_config.json").read_bytes()) | {"do_sample": True, "temperature": 0.7}
    (student / "generation_config.json").write_text(json.dumps(settings))
    rows = [kept_row(n, f"{text.split()[0]} {n}?", text) for n, text in enumerate(WORDS * 6)]
    run = make_run(tmp_path_factory.mktemp("runs") / "small", rows)
    recipe = make_recipe(str(student), method="full", epochs=40, learning_rate=1e-2, max_length=128, test=0.2)
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"system": "Be brief."})})  # type: ignore[union-attr]
    train_run(recipe, run)
    return recipe, run


@pytest.fixture(scope="module")
def exported(taught: tuple[Recipe, RunDir], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an export of a type, which is made once."""

    @cache
    def folder_of(kind: str) -> Path:
        return Path(shutil.copytree(export_gguf(*taught, kind), tmp_path_factory.mktemp("exported") / kind))

    return folder_of


def by_transformers(folder: Path, conversations: list[Any], max_tokens: int) -> list[str]:
    """The greedy answers of a model folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for turns in conversations:
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        found.append(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def by_llama_cpp(file: Path, conversations: list[Any], max_tokens: int) -> list[str]:
    """The greedy answers of a GGUF file, by llama.cpp's own server and the chat template in the file."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = 4096
    server = xllamacpp.Server(settings)
    asked = {"temperature": 0, "max_tokens": max_tokens, "repeat_penalty": 1.0}
    answers = [server.handle_chat_completions({**asked, "messages": turns}) for turns in conversations]
    return [answer["choices"][0]["message"]["content"] for answer in answers]


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_llama_cpp_answers_as_the_folder_does(
    taught: tuple[Recipe, RunDir], exported: Callable[[str], Path], kind: str
) -> None:
    _, run = taught
    folder = exported(kind)
    (file,) = folder.glob("*.gguf")
    assert file.name == f"small-{kind}.gguf"
    asked = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{text.split()[0]} {n}?"}]
        for n, text in enumerate(WORDS * 2)
    ]
    expected = by_transformers(run.student, asked, 24)
    assert {*expected} == {*WORDS}
    assert by_llama_cpp(file, asked, 24) == expected
    assert not [name for name in GGUFReader(file).fields if "sampling" in name]  # the base's own
    written = (folder / "Modelfile").read_text()
    assert f"FROM ./{file.name}\n" in written and 'SYSTEM "Be brief."\n' in written
    assert 'PARAMETER stop "<|im_end|>"' in written and "TEMPLATE" in written
    card = (folder / "README.md").read_text()
    assert f"llama-server --jinja -m {file.name}" in card and "ollama create small -f Modelfile" in card
    assert "- gguf\n" in card and "- lora\n" not in card  # the tags of its page on the Hub


def test_a_file_that_is_not_the_student_is_refused(
    taught: tuple[Recipe, RunDir], exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = exported("f16") / "small-f16.gguf"
    monkeypatch.setattr(train.publish.to_gguf, "_convert", lambda folder, file, kind: shutil.copy(converted, file))
    export_gguf(*taught, "f16")
    monkeypatch.setattr(train.publish.to_gguf, "measure_weights", lambda folder: SimpleNamespace(parameters=7))
    with pytest.raises(DistillError, match="read back, it has other parameters than"):
        export_gguf(*taught, "f16")


def test_what_cannot_be_converted_is_one_line(taught: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--gguf q4_k_m: no such type; there are f32, f16, bf16, q8_0"):
        check_type("q4_k_m")
    run = make_run(tmp_path, [])
    run.student.mkdir()
    for file in taught[1].student.iterdir():
        (run.student / file.name).write_bytes(file.read_bytes())
    config = json.loads((run.student / "config.json").read_bytes())
    (run.student / "config.json").write_text(json.dumps(config | {"architectures": ["OddForCausalLM"]}))
    with pytest.raises(DistillError, match=r"converter .* failed: .*OddForCausalLM"):
        export_gguf(taught[0], run, "f16")
    assert not (run.path / "export" / "gguf").exists() and not (run.student / ADAPTER).exists()


@pytest.mark.parametrize(
    ("last", "error", "says"),
    [
        ("KeyError: 'x'", DistillError, r"converter .* failed: KeyError: 'x'$"),
        ("OSError: [Errno 28] No space left", OSError, r"No space left on device: '.*/export/gguf'$"),
        ("OSError: 8192 requested and 6464 written", OSError, r"No space left on device: '.*/export/gguf'$"),
    ],
)
def test_what_ended_the_converter_is_told_and_not_its_progress(
    taught: tuple[Recipe, RunDir], monkeypatch: pytest.MonkeyPatch, last: str, error: type[Exception], says: str
) -> None:
    said = f"Traceback (most recent call last):\n  in write\n{last}\nWriting:   0%|    | 0/215k"
    ended = SimpleNamespace(returncode=1, stderr=said)
    monkeypatch.setattr("train.publish.to_gguf.subprocess.run", lambda *_, **__: ended)
    monkeypatch.setattr("train.publish.to_gguf._converter", lambda: "wheel")
    with pytest.raises(error, match=says):
        export_gguf(*taught, "f16")


def test_a_damaged_converter_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    wheel = tmp_path / train.publish.to_gguf.CONVERTER_WHEEL
    wheel.touch()  # as after a power cut
    with pytest.raises(DistillError, match=rf"^{wheel}: remove it and run again; its SHA-256 is e3b0c44298fc1c149afb"):
        train.publish.to_gguf._converter()


WAITING_CONVERTER = """
import time
with open({pipe!r}, "w") as pipe:
    print("at work", file=pipe, flush=True)
    time.sleep(60)
    print("went on", file=pipe)
"""
CONVERTING = """
import sys
from pathlib import Path
from train.publish import to_gguf
to_gguf._converter = lambda: sys.argv[1]
to_gguf._convert(Path("model"), Path("file"), "f16")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no kernel tells it")
def test_the_converter_ends_when_the_export_is_killed(tmp_path: Path) -> None:
    pipe, stand_in = tmp_path / "pipe", tmp_path / "wheel" / "conversion"
    os.mkfifo(pipe)
    stand_in.mkdir(parents=True)
    (stand_in / "base.py").write_text(WAITING_CONVERTER.format(pipe=str(pipe)))
    process = subprocess.Popen([sys.executable, "-c", CONVERTING, str(stand_in.parent)])
    try:
        with pipe.open() as said:
            assert said.readline() == "at work\n"
            process.kill()
            assert said.read() == ""  # ends with the converter
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("template", [CHATML, DEFAULTING, TAGGED])
def test_a_usual_chat_format_is_found_and_renders_as_the_tokenizer(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    form = chat_form(tokenizer)
    assert form is not None
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    for said in (turns, turns[:1], [{"role": "system", "content": "S"}, *turns]):
        assert form.render(said) == tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [FOLDED, STRICT])
def test_an_odd_chat_format_is_left_to_ollama(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert chat_form(tokenizer) is None
    assert "TEMPLATE" not in modelfile(make_recipe("student"), "f.gguf", tokenizer, ["<end>"])


def test_the_modelfile_of_a_known_format() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 50, "extra": {"top_k": 20}}
    recipe = Recipe.model_validate({**make_recipe("student").model_dump(), "sampling": sampling})
    assert modelfile(recipe, "x.gguf", tiny_tokenizer(), ["<|im_end|>"]) == (
        "FROM ./x.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}{{ end }}'
        "{{ range $i, $turn := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq $turn.Role "user" }}<|im_start|>user\n{{ $turn.Content }}<|im_end|>\n'
        "{{ if $last }}<|im_start|>assistant\n{{ end }}"
        '{{ else if eq $turn.Role "assistant" }}<|im_start|>assistant\n{{ $turn.Content }}'
        '{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER top_k 20\nPARAMETER min_p 0.0\nPARAMETER repeat_penalty 1.0\n"
        "PARAMETER temperature 0.5\nPARAMETER top_p 0.9\nPARAMETER num_predict 50\n"
    )


def with_extra(**extra: Any) -> Recipe:
    return Recipe.model_validate({**make_recipe("student").model_dump(), "sampling": {"extra": extra}})


@pytest.mark.parametrize(
    ("stop", "lines"),
    [
        ("\n\n", 'PARAMETER stop "\n\n"\n'),  # Ollama knows no escapes
        (["END", "<|im_end|>", "a\\b "], 'PARAMETER stop "END"\nPARAMETER stop "a\\b "\n'),
        (['"', 'say "x"\n'], 'PARAMETER stop """""""\nPARAMETER stop """say "x"\n"""\n'),
        (['x"""\ny', "\x00", "END"], 'PARAMETER stop "END"\n'),
        (None, ""),
    ],
)
def test_a_modelfile_has_the_recipes_stops_as_ollama_reads_them(stop: Any, lines: str) -> None:
    written = modelfile(with_extra(stop=stop), "x.gguf", tiny_tokenizer(), ["<|im_end|>"])
    assert written.partition('PARAMETER stop "<|im_end|>"\n')[2].partition("PARAMETER top_k")[0] == lines


@pytest.mark.parametrize(
    ("system", "line"),
    [
        ('Be "brief".\nAlways.', 'SYSTEM """Be "brief".\nAlways."""\n'),
        ('def f(x):\n    """Return x."""\n    return x', None),  # Ollama would read `return` as a command
        ("Bref\u3000!", None),  # Ollama would drop the blank
    ],
)
def test_a_modelfile_has_the_system_prompt_as_ollama_reads_it(system: str, line: str | None) -> None:
    recipe = make_recipe("student")
    assert recipe.student is not None
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"system": system})})
    written = modelfile(recipe, "x.gguf", tiny_tokenizer(), [])
    assert line in written if line else "SYSTEM" not in written
    assert not_carried_over(recipe) == ([] if line else ["the system prompt"])


def test_a_modelfile_has_the_recipes_penalties() -> None:
    recipe = with_extra(presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.1, min_p=0.05, top_k=None)
    written = modelfile(recipe, "x.gguf", tiny_tokenizer(), []).splitlines()
    parameters = dict(line.split()[1:] for line in written if line.startswith("PARAMETER"))
    assert parameters == {
        "top_k": "0",
        "min_p": "0.05",
        "repeat_penalty": "1.1",
        "temperature": "0.8",
        "top_p": "0.9",
        "num_predict": "500",
        "presence_penalty": "1.5",
        "frequency_penalty": "0.5",
    }
    assert not_carried_over(recipe) == []


def test_what_a_modelfile_cannot_say_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_extra(stop=['x"""\ny', "END"], min_tokens=3, chat_template_kwargs={"enable_thinking": False})
    assert not_carried_over(recipe) == ["min_tokens", "chat_template_kwargs", 'stop \'x"""\\ny\'']
    for step in ("_convert", "_check"):
        monkeypatch.setattr(train.publish.to_gguf, step, lambda *_: None)
    for asked, said in (
        (recipe, "Modelfile: it cannot say min_tokens, chat_template_kwargs, stop "),
        (with_extra(top_k=5), ""),
    ):
        write_gguf(asked, tiny_model(tmp_path / "tiny"), tmp_path, name="x", kind="f16")
        error = capsys.readouterr().err
        assert said in error and ("Modelfile" in error) == bool(said)
