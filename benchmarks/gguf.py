"""`python -m benchmarks.gguf RECIPE [--run DIR]`: greedy answers of an exported GGUF file beside the student's folder.

Reads the run's test prompts, its student and export/gguf/. llama.cpp answers from the file (in float32 arithmetic or
less, as it chooses), transformers from the folder in float32. Writes nothing.
"""

from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.chat import asked_of_student
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.conversation import template_turns
from pipeline.errors import UsageError
from pipeline.records import Prompt, read_jsonl
from pipeline.students import after_training


def main() -> None:
    parser = stage_parser("benchmarks.gguf", "Compares greedy answers of an exported GGUF file and of its student.")
    parser.add_argument("--count", type=int, default=20, help="test prompts")
    recipe, run, options = parse_stage(parser)
    files = sorted((run.path / "export" / "gguf").glob("*.gguf"))
    if not files:
        raise UsageError(f'{run.path}/export/gguf: no file; run make export ARGS="--gguf q8_0" first')
    prompts = (prompt for prompt in read_jsonl(run.prompts, Prompt) if prompt.part == "test")
    asked = [template_turns(asked_of_student(one.messages, recipe.student)) for one in islice(prompts, options.count)]
    most = recipe.sampling.max_tokens
    expected = by_transformers(after_training(recipe, run), asked, most)
    for file in files:
        found = by_llama_cpp(file, asked, most)
        same = sum(ours.strip() == theirs.strip() for ours, theirs in zip(found, expected, strict=True))
        print(f"{file.name}: {same} of {len(asked)} greedy answers are those of the folder, to the letter")
        for turns, ours, theirs in zip(asked, found, expected, strict=True):
            if ours.strip() != theirs.strip():
                print(f"  asked  {turns[-1]['content']!r}\n  file   {ours!r}\n  folder {theirs!r}")


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


if __name__ == "__main__":
    run_stage(main)
