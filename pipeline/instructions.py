"""What the teacher is told, what the student is asked, how much a model reads, and which tokens end its answers.

One place, for every stage. Takes a loaded tokenizer and model, imports nothing heavy, reads and writes no file.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.recipe import Recipe
from pipeline.records import Message
from pipeline.student_config import StudentConfig
from pipeline.teacher_config import TeacherConfig

INSTRUCTIONS = ("system", "developer")  # the roles of a first message that instructs


def told_to_teacher(messages: Sequence[Message], teacher: TeacherConfig) -> list[Message]:
    """The conversation as the teacher gets it: `teacher.system`, `teacher.examples` as turns, then the messages.

    A system message of the prompt's own is joined to `teacher.system`, because many chat templates take only one.
    """
    system, turns = _parted(messages)
    if teacher.system is not None:
        own = [message.content for message in system]
        role = system[0].role if system else "system"
        system = [Message(role=role, content="\n\n".join([teacher.system, *own]))]
    examples = [
        turn
        for example in teacher.examples
        for turn in (Message(role="user", content=example.prompt), Message(role="assistant", content=example.answer))
    ]
    return [*system, *examples, *turns]


def told_in_words(teacher: TeacherConfig) -> str:
    """What only the teacher is told: `a system prompt and 3 examples`; empty if nothing is."""
    count = len(teacher.examples)
    examples = [f"{count} example{'s' * (count > 1)}"] if count else []
    return " and ".join([*(["a system prompt"] if teacher.system else []), *examples])


def asked_of_student(messages: Sequence[Message], student: StudentConfig | None) -> list[Message]:
    """The conversation as the student gets it: with `student.system`, if set, in place of the prompt's own.

    An empty `student.system` takes the prompt's system message away.
    """
    if student is None or student.system is None:
        return list(messages)
    system = [Message(role="system", content=student.system)] if student.system else []
    return [*system, *_parted(messages)[1]]


def system_of_student(recipe: Recipe) -> str | None:
    """The system prompt of a student's every prompt; empty: none at all, None: what a prompt itself brings."""
    own = recipe.student.system if recipe.student else None
    return recipe.prompts.system if own is None else own


def _parted(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The first message if it instructs, and the turns after it."""
    split = int(bool(messages) and messages[0].role in INSTRUCTIONS)
    return list(messages[:split]), list(messages[split:])


def stop_tokens(tokenizer: Any, model: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS and all that generation stops at (an end-of-turn token is one)."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return found


def end_of_turn(tokenizer: Any, stops: set[int]) -> int:
    """The id that the chat template puts after an answer: what a model must say to stop.

    It is the first token of the template's tail that is a stop token (`stops`, see `stop_tokens`) or a special token,
    and not always `eos_token`: Gemma's turns end with <end_of_turn>. Phi-3.5's end with <|end|>, a special token
    that has no name in the tokenizer, and <|endoftext|> (the EOS) stands at the end of the whole conversation.
    """
    answer = "word"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer.encode(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)
    unnamed = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = stops | unnamed | set(tokenizer.all_special_ids)
    end: int = next((token for token in tail if token in ends), tokenizer.eos_token_id)
    return end


def context_of(config: Any) -> int:
    """Tokens that a model reads at once, by its configuration; sys.maxsize if that names no limit.

    With scaled rotary embeddings it may be more than `max_position_embeddings`, which in some models does not count the
    scaling.
    """
    shape = config.get_text_config()
    limit: int = getattr(shape, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(shape, "rope_parameters", None) or {}
    scaled = [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping)]  # one, or one per type of layer
    original = [(kind.get("original_max_position_embeddings") or limit, kind.get("factor") or 1) for kind in scaled]
    return max([limit, *(int(length * factor) for length, factor in original)])
