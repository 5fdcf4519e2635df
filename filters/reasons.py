"""Reasons in words, for people. The records hold them as data (`pipeline.records.Reason`). Reads and writes nothing."""

from collections.abc import Callable

from filters.answer import UNVERIFIED
from pipeline.records import Reason


def describe(why: Reason) -> str:
    """One reason as a sentence, without the name of its rule."""
    if why.note:
        return f"{why.what}: {why.note}" if why.rule == UNVERIFIED else why.note
    kind = why.rule.partition("#")[0]
    return SENTENCES[kind](why) if kind in SENTENCES else ""


def _limit(why: Reason) -> str:
    """`at least 150 wanted`; shares as percentages."""
    words, limit = ("at least", why.at_least) if why.at_least is not None else ("at most", why.at_most)
    return f"{words} {limit:.0%}" if isinstance(limit, float) else f"{words} {limit}"


def _share(why: Reason) -> str:
    """What was measured, as a percentage that differs from that of its limit."""
    value = why.value or 0
    whole = f"{value:.0%}"
    return f"{value:.1%}" if _limit(why).endswith(f" {whole}") else whole


def _repetition(why: Reason) -> str:
    share = f"{_share(why)} of the text, {_limit(why)}"
    kind = "paragraphs" if "paragraph" in why.what else "sentences"
    match why.what:
        case "top_ngrams":
            return f"`{why.found}` {why.count} times: {share}"
        case "duplicate_ngrams":
            return f"repeated runs of {why.n} words: {share}"
        case "repeated_span":
            return f"{why.n} sentences in a row come twice: `{why.found}…`"
        case "duplicate_sentences" | "duplicate_paragraphs":
            return f"{why.count} of {why.total} {kind} are repeats ({_share(why)}), {_limit(why)}: `{why.found}`"
        case _:
            return f"repeated {kind}: {share}: `{why.found}`"


def _adherence(why: Reason) -> str:
    if why.what:
        return f"the prompt has no slot `{why.what}`"
    missing = (f"`{value}` ({slot})" for slot, values in why.missing.items() for value in values)
    return f"asked for and not there: {', '.join(missing)}"


def _language(why: Reason) -> str:
    found = f"language is {why.found}"
    if why.allowed:
        return f"{found} ({why.value:.0%}), allowed: {', '.join(why.allowed)}"
    return f"{found}, but only with {_share(why)}, {_limit(why)} wanted"


def _duplicate(why: Reason) -> str:
    other = (why.of or f"row {why.n}") + (f" in {why.source}" if why.source else "")
    if why.similarity is None:
        return f"the same {why.what} as {other}"
    return f"{why.what} {why.similarity:.2f} similar to {other}"


def _agrees(why: Reason) -> str:
    if why.at_least is not None:
        return f"{why.n} of {why.total} answers agree ({_share(why)}), {_limit(why)} wanted"
    return f"{why.count} of {why.total} answers say the same, {why.n} another"


_VERIFIED = {  # by what was looked at; {0} is what was found
    "pattern": "the pattern is not in `{0}`",
    "json": "is not JSON: {0}",
    "number": "has no number: `{0}`",
    "value": "has no value: `{0}`",
    "statement": "is not one query: {0}",
    "forbidden": "may only read: {0}",
    "error": "does not run: {0}",
    "size": "finds too much: {0}",
    "rows": "finds nothing: `{0}`",
    "time": "takes too long: more than {0}",
    "ended": "ended before its tests did: {0}",
}


def _verified(why: Reason) -> str:
    if why.what == "result":
        return f"finds something else ({why.value} rows, the reference {why.total}): `{why.found}`"
    if why.count is not None:
        return f"{why.count} of {why.total} tests pass; the first that does not: {why.found}"
    if why.what in _VERIFIED:
        return _VERIFIED[why.what].format(why.found)
    if why.what:  # the place in a JSON answer
        return f"{why.what}: {why.found}"
    return f"`{why.found}`, wanted: {' or '.join(f'`{one}`' for one in why.allowed)}"


def _judge(why: Reason) -> str:
    if why.value is None:
        return f"no verdict could be read, in {why.count} attempts"
    low = ", ".join(f"{name} {score}" for name, score in why.scores.items())
    return f"score {why.value}, {_limit(why)} wanted" + (f" ({low})" if low else "")


def _tool_calls(why: Reason) -> str:
    match why.what:
        case "none":
            return "no tool is called"
        case "calls":
            return f"{why.value} tool calls, {_limit(why)} wanted"
        case _:
            return f"calls `{why.found}`, allowed: {', '.join(why.allowed) or 'none'}"


SENTENCES: dict[str, Callable[[Reason], str]] = {
    "length": lambda why: f"{why.value} characters, {_limit(why)} wanted",
    "banned_words": lambda why: f"contains `{why.found}`",
    "repeated_word": lambda why: f"`{why.found}` {why.value} times, {_limit(why)}",
    "prompt_echo": lambda why: f"repeats the instruction: `{why.found}`" if why.found else "there is no instruction",
    "script_ratio": lambda why: f"{why.value:.1%} {why.what}, {_limit(why)} wanted",
    "finish_reason": lambda why: f"finish_reason is `{why.found}`, allowed: {', '.join(why.allowed)}",
    "foreign_script": lambda why: f"{why.value} characters of {why.what}: `{why.found}`",
    "repetition": _repetition,
    "meta_talk": lambda why: f"{why.what} `{why.found}`",
    "adherence": _adherence,
    "ending": lambda why: f"ends with `{why.found}`, no sentence mark" if why.found else "no sentence in it",
    "language": _language,
    "tool_calls": _tool_calls,
    "exact_duplicate": _duplicate,
    "near_duplicate": _duplicate,
    "similar_prompt": _duplicate,
    "contamination": _duplicate,
    "agrees": _agrees,
    "select": lambda why: f"answer {why.n} to this prompt stays ({why.what})",
    **dict.fromkeys(("matches", "choice", "json_schema", "math", "sql", "python"), _verified),
    "judge": _judge,
    "sweep": lambda why: f"rank {why.value} of {why.total}, the best {why.at_most:.0%} are kept",
}
