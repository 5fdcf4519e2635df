"""What a model thought before it answered: told apart from the answer, and given to a chat template with it. Pure.

Models that reason (DeepSeek-R1, Qwen3, QwQ) write `<think>…</think>` before the answer, others have other tags, and a
server without a parser for them passes that on as text. `generate`, the judge and the evaluation read all models by
`split_reasoning`; training and perplexity put the answers into templates by `answer_turn`.
"""

from typing import Any, Literal

from pipeline.records import Completion, Json, Message
from pipeline.train_config import TrainConfig
from pipeline.turns_and_tools import template_turns

OPEN, CLOSE = "<think>", "</think>"
TAGS = {  # around a thought: the first and the last
    OPEN: CLOSE,
    "<thought>": "</thought>",  # Gemini, if it is to show its thoughts, and EXAONE Deep
    "[THINK]": "[/THINK]",  # Magistral
    "<|channel>thought": "<channel|>",  # Gemma 4
}
OPENED = (OPEN, "<thought>")  # of these: what chat templates write themselves, so that the answer has the end alone
Reasoning = Literal["reasoning_content", "content"]  # the field of an answer's turn that has the reasoning
MADE_UP: dict[Reasoning | None, Json] = {  # answers to look at a template with
    "reasoning_content": {"role": "assistant", "content": "answer", "reasoning_content": "thought"},
    "content": {"role": "assistant", "content": f"{OPEN}\nthought\n{CLOSE}\n\nanswer"},
    None: {"role": "assistant", "content": "answer"},
}


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning and the answer of what a model wrote; text without tags is all answer, and unchanged.

    Where only the closing tag is there, the chat template wrote the opening one. Where only the opening tag is there,
    the model was cut off before it answered: the answer is empty. The tag that the text begins with is looked at first:
    a thought may talk of others.
    """
    start = text.lstrip()
    for begin, end in TAGS.items():
        if start.startswith(begin):
            thought, _, answer = start.removeprefix(begin).partition(end)
            return thought.strip(), answer.lstrip()
    for begin in OPENED:
        thought, closed, answer = start.partition(TAGS[begin])
        if closed and begin not in thought:
            return thought.strip(), answer.lstrip()
    return "", text


def answer_turn(row: Completion, reasoning: Reasoning | None) -> Json:
    """The answer as chat templates read it; `reasoning`: where they find what was thought (`reasoning_form`)."""
    turn = template_turns([Message(role="assistant", content=row.text, tool_calls=row.tool_calls)])[0]
    if reasoning == "reasoning_content":
        turn["reasoning_content"] = row.reasoning
    elif reasoning == "content" and row.reasoning:
        turn["content"] = f"{OPEN}\n{row.reasoning}\n{CLOSE}\n\n{row.text}"
    return turn


def reasoning_form(config: TrainConfig, tokenizer: Any) -> Reasoning | None:
    """Where a model's template has an answer's reasoning: a field of its own, as Qwen3's, or the text's beginning.

    None if the recipe strips it, or the template drops it, as DeepSeek-R1's.
    """
    if config.reasoning == "strip":
        return None
    for form, answer in MADE_UP.items():
        turns = [{"role": "user", "content": "question"}, answer]
        if "thought" in tokenizer.apply_chat_template(turns, tokenize=False):
            return form
    return None
