"""What the parts of report.html say, as plain texts: tables, the promise, wins, costs, origin. Draws nothing."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from evaluate.document import Answer, Claim, Difference, Estimate, ModelReport, ProbeFigures, Report, WinRate, number
from evaluate.figures.promise import answer as holds
from evaluate.report.terminal import COLUMNS, HELD_OUT, NOTHING, SPEED, cells, claim_cells
from filters.scripts import character_class

Mark = Literal["pass", "warn", "fail", "unknown", "better", "worse", ""]

FIGURES = {
    "passing": "passes every rule",
    "adherence": "names all that was asked for",
    "named": "named of what was asked for",
    "loops": "loops",
    "stopped": "ends by itself",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "characters": "characters an answer",
    "judge": "judge’s mean, 1 to 5",
}
SHARES = {"passing", "adherence", "named", "loops", "stopped"}
LANGUAGES = {
    "ko": re.compile(f"[{character_class('hangul')}]"),
    "ja": re.compile(f"[{character_class('kana')}]"),
    "zh": re.compile(f"[{character_class('han')}]"),
}
ANSWERS: dict[str, Mark] = {"yes": "pass", "no": "fail", "not shown": "warn"}
VERDICTS: dict[bool | None, tuple[str, Mark]] = {
    True: ("the promise holds", "pass"),
    False: ("the promise does not hold", "fail"),
    None: ("not all of it is measured", "unknown"),
}


class Note(NamedTuple):
    text: str
    mark: Mark


class Cell(NamedTuple):
    """A figure of a model, its interval, and what it is compared with others."""

    text: str
    interval: str = ""
    notes: Sequence[Note] = ()


class Row(NamedTuple):
    name: str
    cells: list[Cell]


class Head(NamedTuple):
    label: str
    reference: str = ""


class Table(NamedTuple):
    """Figures by model."""

    title: str
    heads: list[Head]
    rows: list[Row]


class Part(NamedTuple):
    """One part of the promise."""

    text: str
    promised: str
    here: str
    interval: str
    answer: str
    mark: Mark


class Win(NamedTuple):
    """A bar of wins, ties and losses: percent of the pairs."""

    title: str
    counts: str
    won: float
    tied: float
    lost: float


def lang_of(text: str) -> str:
    """The language that a text's script tells (ko, ja, zh), for the browser's fonts and line breaks; else nothing."""
    return next((code for code, pattern in LANGUAGES.items() if pattern.search(text)), "")


def promise(report: Report) -> list[Part]:
    """Every part of the promise; nothing where none was measured."""
    claims = report.headline.claims
    return [_part(claim) for claim in claims] if any(claim.value for claim in claims) else []


def kept(report: Report) -> Note:
    """Whether the promise holds."""
    return Note(*VERDICTS[report.headline.holds])


def _part(claim: Claim) -> Part:
    promised, here, interval = claim_cells(claim)
    return Part(
        text=claim.text,
        promised=promised,
        here=here,
        interval=interval,
        answer="not measured" if claim.holds is None else holds(claim),
        mark="unknown" if claim.holds is None else ANSWERS[holds(claim)],
    )


def measured(report: Report) -> Table:
    """Perplexity, speed and memory of every model; what nobody has is left out."""
    texts = [dict(zip(COLUMNS, cells(model), strict=True)) for model in report.models]
    wanted = [name for name in (*HELD_OUT, *SPEED) if any(own[name] != NOTHING for own in texts)]
    rows = []
    for name in wanted:
        parts = [own[name].partition("\n") for own in texts]
        rows.append(Row(name, [Cell(text, interval) for text, _, interval in parts]))
    return Table("", [Head(model.label, model.reference) for model in report.models], rows)


def probes(report: Report) -> list[Table]:
    """The answers to the probes: of all of them, of those with unseen values, and which rules they break."""
    models = [model for model in report.models if model.probes]
    if not models or not report.probes:
        return []
    found = [_figures(report, models, "all", f"{report.probes.seen + report.probes.unseen} prompts")]
    if report.probes.unseen and report.probes.seen:
        values = ", ".join(value for values in report.probes.unseen_values.values() for value in values)
        found.append(_figures(report, models, "unseen", f"{report.probes.unseen} prompts with values unseen: {values}"))
    broken = _broken(models)
    return [table for table in (*found, broken) if table.rows]


def _figures(report: Report, models: Sequence[ModelReport], part: Literal["all", "unseen"], title: str) -> Table:
    of: list[ProbeFigures | None] = [getattr(model.probes, part) for model in models]
    rows = []
    for field, name in FIGURES.items():
        estimates = [getattr(figures, field) if figures else None for figures in of]
        if any(estimates):
            own = [
                _cell(estimate, field, _compared(report, model.key, field, part))
                for model, estimate in zip(models, estimates, strict=True)
            ]
            rows.append(Row(name, own))
    return Table(title, [Head(model.label) for model in models], rows)


def _compared(report: Report, key: str, figure: str, part: str) -> list[Note]:
    """The paired differences of a model's figure, in words."""
    against = {model.key: model.label for model in report.models}
    return [
        _note(d, against[d.against])
        for d in report.differences
        if (d.model, d.figure, d.part) == (key, figure, part) and d.improved is not None
    ]


def _note(difference: Difference, against: str) -> Note:
    word: Mark = "better" if difference.improved else "worse"
    return Note(f"{word} than {against.removeprefix('student ')}", word)


def _cell(estimate: Estimate | None, field: str, notes: Sequence[Note]) -> Cell:
    if estimate is None:
        return Cell(NOTHING)
    if field in SHARES:
        return Cell(f"{estimate.value:.0%}", f"{100 * estimate.low:.0f}–{estimate.high:.0%}", notes)
    return Cell(number(estimate.value), f"{number(estimate.low)}–{number(estimate.high)}", notes)


def _broken(models: Sequence[ModelReport]) -> Table:
    shares = [model.probes.all.failed_rules if model.probes else {} for model in models]
    rules = sorted({rule for own in shares for rule in own}, key=lambda rule: -max(own.get(rule, 0) for own in shares))
    rows = [Row(rule, [Cell(f"{own.get(rule, 0):.0%}") for own in shares]) for rule in rules]
    return Table("answers that break", [Head(model.label) for model in models], rows)


def wins(report: Report) -> list[Win]:
    """The judge's choices over all probes."""
    return [_win(win, report) for win in report.wins if win.part == "all" and win.pairs]


def _win(win: WinRate, report: Report) -> Win:
    names = {model.key: model.label for model in report.models}
    rate = f": {win.rate.value:.0%} ({100 * win.rate.low:.0f}–{win.rate.high:.0%})" if win.rate else ""
    counts = f"{win.wins} won, {win.ties} tied, {win.losses} lost; in {win.flipped} the order alone decided"
    counts += f"; the answer shown first was chosen in {win.first_chosen:.0%}" if win.first_chosen is not None else ""
    counts += f"; verdicts that could not be read: {win.unjudged}" if win.unjudged else ""
    won, tied, lost = (round(100 * count / win.pairs, 2) for count in (win.wins, win.ties, win.losses))
    title = f"{names.get(win.model, win.model)} against {names.get(win.against, win.against)}{rate}"
    return Win(title, counts, won, tied, lost)


def fates(answer: Answer) -> Iterator[str]:
    """What became of an answer: the judge's score, the rules that would drop it, an end that was cut off."""
    if answer.score is not None:
        yield f"judge: {answer.score} of 5"
    if answer.finish_reason and answer.finish_reason != "stop":
        yield f"did not end by itself ({answer.finish_reason})"
    for rule, why in answer.dropped_by.items():
        yield f"{rule} would drop it: {why}"


def costs(report: Report) -> list[tuple[str, str]]:
    """Money, tokens and time, from the lineage and the training's log."""
    return [(name, value) for name, value in _costs(report) if value]


def _costs(report: Report) -> Iterator[tuple[str, str]]:
    generated = _section(report, "generate")
    spent, call = generated.get("spent") or {}, generated.get("last_call") or {}
    usd, kept = spent.get("usd"), report.filters.kept if report.filters else None
    if generated:
        yield "answers", _all_of(generated.get("completed"), generated.get("requests"), "requests answered")
        yield "tokens", _tokens(generated, spent)
        yield (
            "money",
            "no price is known: the teacher ran on a machine of your own" if usd is None else f"{usd:,.4g} USD",
        )
        if usd is not None and kept:
            yield "money a kept row", f"{usd / kept:,.3g} USD"
        if call.get("wall_s"):
            yield "last call of generate", f"{_time(call['wall_s'])}, {call.get('answered', 0):,} answers"
    training = report.training
    if training.wall_s is not None:
        tokens = f", {training.tokens:,} tokens" if training.tokens else ""
        yield "training", f"{_time(training.wall_s)}{tokens}"


def _all_of(part: Any, whole: Any, what: str) -> str:
    return f"{part:,} of {whole:,} {what}" if isinstance(part, int) and isinstance(whole, int) else ""


def _tokens(generated: Mapping[str, Any], spent: Mapping[str, Any]) -> str:
    named = [(generated.get("prompt_tokens"), "prompt"), (generated.get("completion_tokens"), "completion")]
    named.append((spent.get("tokens"), "in all, failed attempts counted"))
    return ", ".join(f"{count:,} {what}" for count, what in named if isinstance(count, int))


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def origin(report: Report) -> list[tuple[str, str]]:
    """Teacher, data, student, machine and versions: one line each."""
    found = dict(_origin(report)) | report.machine | report.versions
    return [(name, value) for name, value in found.items() if value]


def _origin(report: Report) -> Iterator[tuple[str, str]]:
    generated, filtered, trained = (_section(report, name) for name in ("generate", "filters", "train"))
    teacher = generated.get("teacher")
    if isinstance(teacher, Mapping):
        yield "teacher", str(teacher.get("asked", ""))
    sampling = generated.get("sampling")
    if isinstance(sampling, Mapping):
        yield "sampling", ", ".join(f"{name} {value}" for name, value in sampling.items())
    rules = filtered.get("rules")
    if isinstance(rules, list):
        yield "rules", ", ".join(str(rule.get("rule")) for rule in rules if isinstance(rule, Mapping))
    if trained:
        yield "student", str(trained.get("student", ""))
        yield "training", f"{trained.get('method')}, seed {trained.get('seed')}, {trained.get('precision', '')}"


def _section(report: Report, name: str) -> Mapping[str, Any]:
    section = report.lineage.get(name)
    return section if isinstance(section, Mapping) else {}
