"""report.html: the report as one self-contained page, no script, no link to anywhere. Draws; computes nothing."""

import json

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluate.document import Report, write_report
from evaluate.report import sections
from evaluate.report.charts import axis_charts, bar_groups, drop_bars, loss_chart
from pipeline.rundir import RunDir, replacing


def render_html(report: Report) -> str:
    """The page. Every text of the report is escaped."""
    environment = Environment(
        loader=PackageLoader("evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"lang_of": sections.lang_of, "fates": sections.fates}  # macros see globals alone
    return environment.get_template("report.html.j2").render(
        report=report,
        promise=sections.promise(report),
        kept=sections.kept(report),
        axes=axis_charts(report),
        measured=sections.measured(report),
        groups=bar_groups(report),
        probes=sections.probes(report),
        wins=sections.wins(report),
        drops=drop_bars(report.filters),
        loss=loss_chart(report.training),
        costs=sections.costs(report),
        origin=sections.origin(report),
        lineage=json.dumps(report.lineage, ensure_ascii=False, indent=2),
    )


def publish(run: RunDir, report: Report) -> None:
    """Writes report.html, and then report.json."""
    with replacing(run.report_html) as file:
        file.write(render_html(report).encode())
    write_report(run, report)
