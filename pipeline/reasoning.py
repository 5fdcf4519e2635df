"""What a model thought before it answered, told apart from the answer. Pure: reads and writes nothing.

Models that reason (DeepSeek-R1, Qwen3, QwQ) write `<think>…</think>` before the answer, and a server without a parser
for it passes that on as text. `generate`, the judge and the evaluation read all models by this one function.
"""

OPEN, CLOSE = "<think>", "</think>"


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning and the answer of what a model wrote; text without tags is all answer, and unchanged.

    Where only the closing tag is there, the chat template wrote the opening one. Where only the opening tag is there,
    the model was cut off before it answered: the answer is empty.
    """
    start = text.lstrip()
    opened = start.startswith(OPEN)
    thought, closed, answer = start.removeprefix(OPEN).partition(CLOSE)
    if not opened and (not closed or OPEN in thought):
        return "", text
    return thought.strip(), answer.lstrip()
