"""Ollama's Modelfile for a student: its chat template, system prompt, stop tokens and sampling.

Ollama's templates are Go's. Most chat formats put fixed text around each turn: `chat_form` finds that text by rendering
conversations of known words, and makes sure that it renders others as the tokenizer does. A format that it cannot
express so is left to Ollama, which knows the usual ones by the template in the GGUF file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.instructions import system_of_student
from pipeline.recipe import Recipe
from pipeline.sampling_config import LOGPROBS

SYSTEM, USER, ANSWER, NEXT = "xsystemx", "xuserx", "xanswerx", "xnextx"  # words that no template has of its own
# Ollama's own values would differ from the server that the student was measured on.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
OURS = {"max_tokens": "num_predict", "repetition_penalty": "repeat_penalty"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
}
# The recipe's seed is no request's own: with one in the Modelfile, every answer to a question would be the same.
NOT_MISSED = {"seed", "stop", *LOGPROBS}

# A template of Ollama; each `%s` is a fixed text of the format, in the order of `ChatForm.go`.
GO = (
    "{{ if .System }}%s{{ .System }}%s{{ else }}%s{{ end }}"
    "{{ range $i, $turn := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq $turn.Role "user" }}%s{{ $turn.Content }}%s{{ if $last }}%s{{ end }}'
    '{{ else if eq $turn.Role "assistant" }}%s{{ $turn.Content }}{{ if not $last }}%s{{ end }}{{ end }}{{ end }}'
)


class ChatForm(NamedTuple):
    """The fixed text of a chat format."""

    begin: str  # of a conversation without a system message
    system: tuple[str, str]  # before and after the text
    user: tuple[str, str]
    answer: tuple[str, str]
    prompt: str  # what asks for an answer

    def render(self, turns: Sequence[dict[str, str]]) -> str:
        """A conversation that ends with the user, as the model is asked it."""
        around = {"system": self.system, "user": self.user, "assistant": self.answer}
        text = "" if turns[0]["role"] == "system" else self.begin
        for turn in turns:
            before, after = around[turn["role"]]
            text += before + turn["content"] + after
        return text + self.prompt

    def go(self) -> str:
        """The format as a Go template for Ollama. A last answer is left open, so that the model continues it."""
        texts = (*self.system, self.begin, *self.user, self.prompt, *self.answer)
        return GO % tuple(text.replace("{{", '{{ "{{" }}') for text in texts)


def chat_form(tokenizer: Any) -> ChatForm | None:
    """The fixed text of the tokenizer's chat template; None if the template does more than to put it around turns."""

    def rendered(*turns: tuple[str, str], ask: bool = True) -> str:
        said = [{"role": role, "content": content} for role, content in turns]
        text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=ask)
        return text

    user, answer, following = ("user", USER), ("assistant", ANSWER), ("user", NEXT)
    try:
        lead, end = rendered(user, ask=False).split(USER)
        close = rendered(user, answer, ask=False).rpartition(ANSWER)[2]
        _, between, onward, last = _cut(rendered(user, answer, following), USER, ANSWER, NEXT)
        opened, told, _ = _cut(rendered(("system", SYSTEM), user), SYSTEM, USER)
        form = ChatForm(
            begin=_without(lead, end=(start := _without(onward, begin=close))),
            system=(opened, _without(told, end=start)),
            user=(start, end),
            answer=(_without(between, begin=end), close),
            prompt=_without(last, begin=end),
        )
        known = all(
            form.render([{"role": role, "content": content} for role, content in turns]) == rendered(*turns)
            for begin in ([], [("system", "Sei kurz.")])
            for turns in ([*begin, user], [*begin, user, answer, following, answer, user])
        )
    except Exception:  # a template may refuse a conversation by any error of its own
        return None
    return form if known else None


def modelfile(recipe: Recipe, file: str, tokenizer: Any, stops: Sequence[str]) -> str:
    form = chat_form(tokenizer)
    texts = [("TEMPLATE", _without_bos(form, tokenizer).go() if form else ""), ("SYSTEM", system_of_student(recipe))]
    texts += [("PARAMETER stop", stop) for stop in dict.fromkeys([*stops, *_own_stops(recipe)])]
    quoted = [(name, _quoted(text)) for name, text in texts if text]
    sampling = recipe.sampling.fields()
    values = NEUTRAL | {OURS[name]: value for name, value in sampling.items() if name in OURS and value is not None}
    lines = [f"FROM ./{file}"]
    lines += [f"{name} {text}" for name, text in quoted if text is not None]
    lines += [f"PARAMETER {name} {value}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def not_carried_over(recipe: Recipe) -> list[str]:
    """What of the recipe's sampling and system prompt a Modelfile cannot say."""
    sampling = recipe.sampling.fields()
    names = [name for name, value in sampling.items() if name not in {*OURS, *NOT_MISSED} and value is not None]
    names += [f"stop {stop!r}" for stop in _own_stops(recipe) if _quoted(stop) is None]
    return names + (["the system prompt"] if _quoted(system_of_student(recipe) or "") is None else [])


def _own_stops(recipe: Recipe) -> list[str]:
    """The texts that end an answer by the recipe, beside the student's own tokens."""
    stops = recipe.sampling.extra.get("stop") or []
    return [stops] if isinstance(stops, str) else list(stops)


def _quoted(text: str) -> str | None:
    """Text as a Modelfile quotes it; None if it cannot.

    Ollama's parser knows no escapes: a newline is one. It ends a value at the first newline after what looks like the
    closing quotes, and drops characters that are not printable.
    """
    quotes = '"""' if '"' in text else '"'
    lines = (quotes + text).splitlines(keepends=True)
    begun = ["".join(lines[:count]).strip() for count in range(1, len(lines))]  # the value, at each of its newlines
    cut = any(part.endswith(quotes) and len(part) >= 2 * len(quotes) for part in begun)
    if cut or not all(character.isprintable() or character in "\t\r\n" for character in text):
        return None
    return f"{quotes}{text}{quotes}"


def _without_bos(form: ChatForm, tokenizer: Any) -> ChatForm:
    """llama.cpp puts the first token before a text by itself, where the tokenizer does."""
    bos = tokenizer.bos_token or ""
    if not bos or tokenizer("x").input_ids[0] != tokenizer.bos_token_id:
        return form
    return form._replace(begin=form.begin.removeprefix(bos), system=(form.system[0].removeprefix(bos), form.system[1]))


def _cut(text: str, *words: str) -> list[str]:
    """The text before, between and after the words. Raises ValueError if one is not there, in this order."""
    parts = []
    for word in words:
        before, text = text.split(word)
        parts.append(before)
    return [*parts, text]


def _without(text: str, *, begin: str = "", end: str = "") -> str:
    """The text without its begin or end. Raises ValueError if it has another."""
    if not (text.startswith(begin) and text.endswith(end)):
        raise ValueError(text)
    return text[len(begin) : len(text) - len(end)]
