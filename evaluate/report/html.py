"""report.html, one self-contained page without scripts or links; results.svg of an experiment. Computes no figure."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluate.document import Report, ShownAnswer, percent
from evaluate.report import charts, tables
from filters.scripts import character_class
from pipeline.lineage import spent_on_answers
from pipeline.rundir import RunDir, write_file, write_json

LANGUAGES = {
    "ko": re.compile(f"[{character_class('hangul')}]"),
    "ja": re.compile(f"[{character_class('kana')}]"),
    "zh": re.compile(f"[{character_class('han')}]"),
}


def publish(run: RunDir, report: Report) -> None:
    """Writes report.html, and then report.json."""
    write_file(run.report_html, render_html(report).encode())
    write_json(run.report, report)


def render_html(report: Report) -> str:
    """The page. Every text of the report is escaped."""
    return _render(
        "report.html.j2",
        report=report,
        promise=tables.promise(report).rows if any(claim.value for claim in report.headline.claims) else [],
        kept=tables.Line(*tables.VERDICTS[report.headline.holds]),
        axes=charts.axis_panels(report),
        verified=tables.verified(report),
        measured=tables.measured(report),
        probes=tables.probes(report),
        wins=tables.wins(report),
        drops=charts.drop_bars(report.filters),
        loss=charts.loss_chart(report.training),
        nodes=tables.nodes(report),
        spent=spent_on_answers(report.lineage.get("generate", {})),
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
    environment.globals |= {"lang_of": lang_of, "remarks": remarks, "percent": percent}  # macros see globals only
    return environment.get_template(template).render(**variables)


def lang_of(text: str) -> str:
    """The language of a text by its script (ko, ja, zh), for the browser's fonts and line breaks; else nothing."""
    return next((code for code, pattern in LANGUAGES.items() if pattern.search(text)), "")


def remarks(answer: ShownAnswer) -> Iterator[str]:
    """What is known of an answer: the judge's score, an end that was cut off, the rules that would drop it."""
    if answer.right is not None:
        yield "right" if answer.right else "wrong"
    if answer.score is not None:
        yield f"judge: {answer.score:g} of 5"
    if answer.text and answer.finish_reason not in ("", "stop"):
        yield f"did not end by itself ({answer.finish_reason})"
    for rule, why in answer.dropped_by.items():
        yield f"{rule}: {why}" if answer.right is False else f"{rule} would drop it: {why}"
