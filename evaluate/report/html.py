"""report.html, one self-contained page without scripts or links; results.svg of an experiment. Computes no figure."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluate.document import Answer, Report, write_report
from evaluate.report import charts, tables
from filters.scripts import character_class
from pipeline.rundir import RunDir, replacing

LANGUAGES = {
    "ko": re.compile(f"[{character_class('hangul')}]"),
    "ja": re.compile(f"[{character_class('kana')}]"),
    "zh": re.compile(f"[{character_class('han')}]"),
}


def publish(run: RunDir, report: Report) -> None:
    """Writes report.html, and then report.json."""
    with replacing(run.report_html) as file:
        file.write(render_html(report).encode())
    write_report(run, report)


def render_html(report: Report) -> str:
    """The page. Every text of the report is escaped."""
    parts = tables.promise(report)
    return _render(
        "report.html.j2",
        report=report,
        promise=parts if any(claim.value for claim in report.headline.claims) else [],
        kept=tables.Note(*tables.VERDICTS[report.headline.holds]),
        axes=charts.axis_panels(report),
        measured=tables.measured(report),
        bars=charts.bar_panels(report),
        probes=tables.probes(report),
        wins=tables.wins(report),
        drops=charts.drop_panel(report.filters),
        loss=charts.loss_chart(report.training),
        costs=[(name, value) for name, value in _costs(report) if value],
        origin=[(name, value) for name, value in _origin(report) if value],
        lineage=json.dumps(report.lineage, ensure_ascii=False, indent=2),
    )


def draw_svg(title: str, panels: Sequence[charts.Panel]) -> str:
    """Panels of dots with their intervals, one below the other, as one self-contained SVG."""
    return _render("dots.svg.j2", title=title, panels=panels)


def _render(template: str, **variables: Any) -> str:
    environment = Environment(
        loader=PackageLoader("evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"lang_of": lang_of, "remarks": remarks}  # macros see globals only
    return environment.get_template(template).render(**variables)


def lang_of(text: str) -> str:
    """The language of a text by its script (ko, ja, zh), for the browser's fonts and line breaks; else nothing."""
    return next((code for code, pattern in LANGUAGES.items() if pattern.search(text)), "")


def remarks(answer: Answer) -> Iterator[str]:
    """What is known of an answer: the judge's score, an end that was cut off, the rules that would drop it."""
    if answer.score is not None:
        yield f"judge: {answer.score} of 5"
    if answer.finish_reason and answer.finish_reason != "stop":
        yield f"did not end by itself ({answer.finish_reason})"
    for rule, why in answer.dropped_by.items():
        yield f"{rule} would drop it: {why}"


def _costs(report: Report) -> Iterator[tuple[str, str]]:
    """Money, tokens and time, from the lineage and the training's log."""
    generated, training = report.lineage.get("generate") or {}, report.training
    spent, call = generated.get("spent") or {}, generated.get("last_call") or {}
    usd, kept = spent.get("usd"), report.filters.kept if report.filters else None
    if generated:
        requests, completed = generated.get("requests"), generated.get("completed")
        yield "answers", f"{completed:,} of {requests:,} requests answered" if completed and requests else ""
        counts = [(generated.get("prompt_tokens"), "prompt"), (generated.get("completion_tokens"), "completion")]
        counts.append((spent.get("tokens"), "in all, failed attempts counted"))
        yield "tokens", ", ".join(f"{count:,} {what}" for count, what in counts if count)
        yield "money", "no price is known: the teacher ran on your own machine" if usd is None else f"{usd:,.4g} USD"
        yield "money per kept row", f"{usd / kept:,.3g} USD" if usd is not None and kept else ""
        took, answered = call.get("wall_s"), call.get("answered", 0)
        yield "last call of generate", f"{_time(took)}, {answered:,} answers" if took else ""
    if training.wall_s is not None:
        yield "training", _time(training.wall_s) + (f", {training.tokens:,} tokens" if training.tokens else "")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _origin(report: Report) -> Iterator[tuple[str, str]]:
    """Teacher, sampling, rules, student, machine and versions: one line each."""
    generated, filtered, trained = (report.lineage.get(stage) or {} for stage in ("generate", "filters", "train"))
    yield "teacher", generated.get("teacher", {}).get("asked", "")
    yield "sampling", ", ".join(f"{name} {value}" for name, value in generated.get("sampling", {}).items())
    yield "rules", ", ".join(rule["rule"] for rule in filtered.get("rules", []))
    if trained:
        yield "student", trained.get("student", "")
        yield "training", f"{trained.get('method')}, seed {trained.get('seed')}, {trained.get('precision', '')}"
    yield from report.machine.items()
    yield from report.versions.items()
