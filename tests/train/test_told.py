"""A teacher that is told more than the student: each reads its own prompt, and both are compared on the same answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.sampling_config import SamplingConfig
from pipeline.teacher_config import TeacherConfig
from tests.servers.fake_vllm import scoring
from tests.tiny_student import SHAPE, kept_row, make_recipe, make_run, saved, story_rows, tiny_model
from train import top_k
from train.processes import ALONE, Processes
from train.record import training_fingerprint
from train.rows import to_examples
from train.run import _of_teacher
from train.setting import Setting
from train.tokens import MASKED, answered_row, key_of, prompt_of
from train.told import TeacherPrompts, Told, told_prompts
from train.top_k import ask_endpoint
from train.trainer import prepare


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(tiny_model(folder / "student")), str(tiny_model(folder / "teacher", layers=4))


def examples() -> dict[str, list[dict[str, Any]]]:
    rows = to_examples([*story_rows(5), kept_row(5, "Story 5, a long one?", "End 5.")])
    told = [{**row, "told": [{"role": "system", "content": "The cat is Tom."}, *row["prompt"]]} for row in rows]
    return {"train": told[2:], "validation": [*rows[:2]]}


def prompts_of(told: Told, start: int = 0) -> TeacherPrompts:
    """The prompts of two questions, [5] and [5, 6], of which the first `start` tokens are left out."""
    found = TeacherPrompts(told, [[5], [5, 6]])
    found.start = found.start[:start]
    assert len(found.start) == start
    return found


def test_a_batch_has_the_teachers_prompts_and_the_same_answers() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]),
        "labels": torch.tensor([[MASKED, MASKED, 7, 8], [MASKED, 9, MASKED, MASKED]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    assert prompts_of({}).in_batch(batch, 0) is batch
    told = {key_of([5]): [1, 2, 5], key_of([5, 6]): [1, 2, 5, 6]}
    later = prompts_of(told, 2).in_batch(batch, 0)
    assert later["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert later["labels"].tolist() == [[MASKED, MASKED, 7, 8], [MASKED, 9, MASKED, MASKED]]
    assert later["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    found = prompts_of({key_of([5]): [1, 2, 5]}).in_batch(batch, 0)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8], [1, 2, 5, 9]]
    assert found["labels"].tolist() == [[MASKED, MASKED, 7, 8], [MASKED, MASKED, MASKED, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_samples_follow_the_teachers_prompts() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 5, 9, 0]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    ids, mask = prompts_of({key_of([5]): [1, 2, 5]}).before_samples(ids, mask, 2, 0)
    assert ids.tolist() == [[0, 5, 6, 7, 8], [1, 2, 5, 9, 0]]
    assert mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_samples_follow_what_comes_after_the_shared_start() -> None:
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 5, 9, 0]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    told = {key_of([5]): [1, 2, 5], key_of([5, 6]): [1, 2, 5, 6]}
    assert TeacherPrompts({}, [[5, 6], [5, 6]]).start == []  # such a teacher reads the student's whole prompts
    assert TeacherPrompts(told, [[5], [5, 6]]).start == [1, 2]  # the first answer begins after a token of its prompt
    ids, mask = prompts_of(told, 2).before_samples(ids, mask, 2, 0)
    assert ids.tolist() == [[5, 6, 7, 8], [0, 5, 9, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]]


def test_the_teacher_reads_once_what_its_prompts_share(models: tuple[str, str], tmp_path: Path) -> None:
    trainer, read = prepared(models, tmp_path, method="kd", kd={"weights": "full"}), list[int]()
    trainer.teacher.register_forward_pre_hook(
        lambda _model, _args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    with torch.no_grad():
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    prompts = trainer.teacher_prompts
    start = len(prompts.start)
    system = trainer.processing_class("The cat is Tom.")["input_ids"]
    assert start > len(system)
    told = [prompts.in_batch(batch, 0)["attention_mask"].shape[1] for batch in batches]
    assert read == [start, *(length - start for length in told)]
    assert all(ids[:start] == prompts.start and len(ids) > start for ids in prompts.told.values())


WINDOW = {"head_dim": 16, "sliding_window": 16}
OF_OTHER_LAYERS = {
    "lfm2": transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, **WINDOW, layer_types=["sliding_attention", "full_attention"]),
}


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        ("kd", "llama"),
        ("kd", "mixtral"),
        ("kd", "lfm2"),
        ("on_policy", "llama"),
        ("on_policy", "lfm2"),
        ("on_policy", "gemma3"),
    ],
)
def test_after_the_shared_start_the_teacher_says_what_it_says_after_the_whole(
    method: str, architecture: str, models: tuple[str, str], tmp_path: Path
) -> None:
    own = {"max_new_tokens": 6, "beta": 0}
    if architecture == "mixtral":
        models = (models[0], str(tiny_model(tmp_path / "router", layers=2, architecture=architecture)))
    elif config := OF_OTHER_LAYERS.get(architecture):
        models = (models[0], str(saved(config, tmp_path / "teacher")))
    trainer = prepared(models, tmp_path, method=method, kd={"weights": "full"}, on_policy=own, micro_batch_size=4)
    shares = method == "kd" or architecture == "llama"  # samples have gaps before them, which others would read
    assert bool(trainer.teacher_prompts.start) == shares
    teacher = (trainer.teacher if method == "kd" else trainer.teacher_model).float()
    for weights in teacher.parameters():
        weights.normal_(std=0.3)  # what it says depends on all that it has read
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    def said() -> torch.Tensor:
        if method == "kd":
            return trainer.divergence(torch.zeros(int((batch["labels"] != MASKED).sum()), trainer.vocabulary), batch)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        hidden = trainer._get_last_hidden_state(teacher, ids, mask, batch["completion_ids"].shape[1])
        return hidden[batch["completion_mask"].bool()]

    with torch.no_grad():
        after_start, trainer.teacher_prompts.start = said(), []
        assert trainer.teacher_prompts.start_states(teacher, 1) is None
        whole, trainer.teacher_prompts.told = said(), {}
        torch.testing.assert_close(after_start, whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(said(), whole, rtol=1e-2)  # of what it is told it says something else


def prepared(models: tuple[str, str], folder: Path, **train: Any) -> Any:
    config = make_recipe(*models, **train).train
    teacher = TeacherConfig(model=models[1])
    return prepare(models[0], examples(), Setting(config, folder, Console(quiet=True), teacher=teacher)).trainer


def scores(model: str, prompt: list[dict[str, Any]], answer: torch.Tensor) -> torch.Tensor:
    """Log-probabilities where each token of the answer is predicted, in float64."""
    chat = AutoTokenizer.from_pretrained(model).apply_chat_template(
        prompt, add_generation_prompt=True, return_dict=True
    )
    asked = torch.tensor(chat["input_ids"])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        return loaded(input_ids=torch.cat([asked, answer])[None]).logits[0, len(asked) - 1 : -1].log_softmax(-1)


def test_kd_follows_what_the_teacher_says_after_its_own_prompt(models: tuple[str, str], tmp_path: Path) -> None:
    trainer = prepared(models, tmp_path, method="kd", kd={"weights": "full", "alpha": 1.0})
    assert len(trainer.teacher_prompts.told) == 4
    batch = trainer.data_collator([trainer.train_dataset[0]])
    row, answer = examples()["train"][0], batch["labels"][batch["labels"] != MASKED]
    q, p = scores(models[0], row["prompt"], answer), scores(models[1], row["told"], answer)
    expected = (p.exp() * (p - q)).sum().item()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model.eval(), batch, num_items_in_batch=torch.tensor(1)).item()
    assert found == pytest.approx(expected, rel=1e-3 if trainer.teacher.dtype == torch.float32 else 5e-2)


def test_on_policy_follows_what_the_teacher_says_after_its_own_prompt(models: tuple[str, str], tmp_path: Path) -> None:
    own = {"max_new_tokens": 6, "beta": 0}
    trainer = prepared(models, tmp_path, method="on_policy", kd={"weights": "full"}, on_policy=own, micro_batch_size=4)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model.train(), inputs).item()
    total, tokens, by_question = 0.0, 0, {row["prompt"][0]["content"]: row for row in examples()["train"]}
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    for prompt, ids, mask in zip(
        inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"], strict=True
    ):
        row = next(row for question, row in by_question.items() if question in tokenizer.decode(prompt))
        answer = ids[mask.bool()]
        q, p = scores(models[0], row["prompt"], answer), scores(models[1], row["told"], answer)
        total, tokens = total + (p.exp() * (p - q)).sum().item(), tokens + len(answer)
    exact = trainer.teacher_model.dtype == torch.float32
    assert found == pytest.approx(total / tokens, rel=1e-3 if exact else 5e-2)


def asking(models: tuple[str, str], url: str, folder: Path, processes: Processes = ALONE) -> Setting:
    config = make_recipe(*models, method="kd", kd={"teacher": "served", "top_k": 5}).train
    teacher = TeacherConfig(model=models[1], base_url=url)
    return Setting(config, folder, Console(quiet=True), processes, teacher, folder / "said.jsonl")


def test_an_endpoint_is_asked_once_about_an_answer(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = prepared(models, tmp_path, method="full")
    rows, tokenizer = [*trainer.train_dataset], trainer.processing_class
    monkeypatch.setattr("train.top_k.AT_ONCE", 1)
    with scoring(models[1]) as server:
        setting, before = asking(models, server.url, tmp_path), top_k._said
        lines = setting.logprobs
        assert lines is not None

        def killed(*given: Any) -> Any:
            if lines.read_bytes().count(b"\n") == 2:
                raise KeyboardInterrupt
            return before(*given)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("train.top_k._said", killed)
            ask_endpoint(setting, rows, tokenizer, {})
        with lines.open("ab") as file:
            file.write(b'{"id":"torn')
        first = ask_endpoint(setting, rows, tokenizer, {})
        again = ask_endpoint(setting, rows, tokenizer, {})
        scored = [prompt for one in server.asked if "prompt_logprobs" in one for prompt in one["prompt"]]
        assert sorted(scored) == sorted(row["input_ids"] for row in rows)
        for key, arrays in first.items():
            assert all((one == other).all() for one, other in zip(arrays, again[key], strict=True))
        told = told_prompts(rows, examples()["train"], tokenizer)
        ask_endpoint(setting, rows, tokenizer, told)  # after another prompt it says something else
        assert len([one for one in server.asked if "prompt_logprobs" in one]) == 2 * len(rows)


def test_an_endpoint_is_asked_after_the_teachers_own_prompt(models: tuple[str, str], tmp_path: Path) -> None:
    trainer = prepared(models, tmp_path, method="full")
    rows, tokenizer = [*trainer.train_dataset], trainer.processing_class
    told = told_prompts(rows, examples()["train"], tokenizer)
    with scoring(models[1]) as server:
        known = ask_endpoint(asking(models, server.url, tmp_path), rows, tokenizer, told)
    answer = torch.tensor([label for label in rows[0]["labels"] if label != MASKED])
    expected = scores(models[1], examples()["train"][0]["told"], answer).sort(descending=True)
    likeliest, logprobs = known[key_of(rows[0]["input_ids"])]
    assert likeliest[:, 0].tolist() == expected.indices[:, 0].tolist()
    assert logprobs[:, :5] == pytest.approx(expected.values[:, :5].numpy(), abs=0.01)


def test_of_several_processes_each_asks_about_its_share_and_has_all(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = prepared(models, tmp_path, method="full")
    rows, tokenizer, others = [*trainer.train_dataset], trainer.processing_class, list[Any]()
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*others, *own])
    with scoring(models[1]) as server:
        for rank in range(2):
            asked = len(server.asked)
            setting = asking(models, server.url, tmp_path, Processes(rank, count=2))
            known = ask_endpoint(setting, rows, tokenizer, {})
            scored = [one for one in server.asked[asked:] if "prompt_logprobs" in one]
            assert sum(len(one["prompt"]) for one in scored) == len(rows) // 2
            others.append(known)
    assert known.keys() == {key_of(row["input_ids"]) for row in rows}


QUIET = {"extra": {"chat_template_kwargs": {"enable_thinking": False}}}


def test_a_teachers_prompt_is_rendered_as_its_endpoint_rendered_it(models: tuple[str, str]) -> None:
    """Asked not to think, Qwen3 reads an empty thought; without it the first token that it expects opens one."""
    from train.gold import _asked  # here: TRL warns when it is imported

    row, (student, teacher) = story_rows(1)[0], map(AutoTokenizer.from_pretrained, models)
    teacher.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    recipe = make_recipe(*models, method="kd").model_copy(update={"sampling": SamplingConfig(**QUIET)})
    example = {**to_examples([row])[0], **_of_teacher(row, recipe)}
    tokens = answered_row(example, example["completion"][0], student)
    (told,) = told_prompts([tokens], [example], teacher).values()
    assert teacher.decode(told) == _asked(example, teacher)
    assert teacher.decode(told).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_an_empty_thought_that_the_answer_begins_with_too_is_read_once(models: tuple[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    for told in [], [{"role": "system", "content": "The cat is Tom."}]:
        (example,) = to_examples(story_rows(1))
        example |= {"told": [*told, *example["prompt"]], "template": QUIET["extra"]["chat_template_kwargs"]}
        row = answered_row(example, example["completion"][0], tokenizer)
        own = prompt_of(row)
        read = told_prompts([row], [example], tokenizer).get(key_of(own), own) + row["input_ids"][len(own) :]
        assert tokenizer.decode(read).count("<think>\n\n</think>\n\n") == 1
        assert (
            read
            == answered_row({**example, "prompt": example["told"]}, example["completion"][0], tokenizer)["input_ids"]
        )


TOLD = [
    ("teacher", {"system": "The cat is Tom."}),
    ("teacher", {"examples": [{"prompt": "Hi", "answer": "Hello"}]}),
    ("sampling", QUIET),
]


@pytest.mark.parametrize(("section", "told"), TOLD)
@pytest.mark.parametrize(
    ("train", "reads"),
    [
        ({"method": "kd", "kd": {"weights": "full"}}, True),
        ({"method": "gold", "kd": {"weights": "full"}}, True),
        ({"method": "on_policy", "kd": {"weights": "full"}}, True),
        ({"method": "kd", "kd": {"weights": "full", "teacher": "stored"}}, False),  # it was told when it answered
        ({"method": "full"}, False),
    ],
)
def test_what_a_teacher_is_told_while_training_is_in_the_fingerprint(
    tmp_path: Path, train: dict[str, Any], reads: bool, section: str, told: dict[str, Any]
) -> None:
    run, recipe = make_run(tmp_path, story_rows(6)), make_recipe("student", **train)
    own = getattr(recipe, section)
    other = recipe.model_copy(update={section: own.model_validate(own.model_dump(exclude_unset=True) | told)})
    assert (training_fingerprint(other, run) != training_fingerprint(recipe, run)) == reads
