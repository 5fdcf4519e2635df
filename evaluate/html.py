"""report.html: the report as one self-contained page, no script, no link to anywhere. Draws; computes nothing."""

import json

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluate.charts import bar_groups, drop_bars, loss_chart
from evaluate.report import Report
from evaluate.table import COLUMNS, cells


def render_html(report: Report) -> str:
    """The page. Every text of the report is escaped."""
    environment = Environment(
        loader=PackageLoader("evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        columns=COLUMNS,
        rows=[(model, [cell.split("\n") for cell in cells(model)]) for model in report.models],
        groups=bar_groups(report),
        drops=drop_bars(report.filters),
        loss=loss_chart(report.training),
        lineage=json.dumps(report.lineage, ensure_ascii=False, indent=2),
    )
