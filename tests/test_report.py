"""What the report shows: the table, the page, its charts. Figures are made up; nothing is measured."""

import io
import math
import re

import msgspec
import pytest
from rich.console import Console

from evaluate.charts import LossChart, bar_groups, drop_bars, loss_chart
from evaluate.html import render_html
from evaluate.report import (
    SCHEMA,
    Answer,
    Estimate,
    Filtering,
    Headline,
    LossPoint,
    ModelReport,
    Report,
    Rows,
    RuleDrops,
    Sample,
    Training,
    number,
)
from evaluate.table import millions, print_report

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>"
KOREAN = "옛날 옛적에 토끼 토토가 살았어요."


def make_report(**changes: object) -> Report:
    models = [
        ModelReport(
            key="teacher",
            label="teacher",
            reference="org/teacher",
            parameters=1_540_000_000,
            weights_mib=2944.4,
            perplexity=Estimate(3.412, 3.2, 3.6),
            bits_per_character=Estimate(1.1119, 1.05, 1.18),
            tokens_per_s=55.12,
            peak_rss_mib=7312.4,
        ),
        ModelReport(
            key="student_before",
            label="student before",
            reference="org/student",
            parameters=494_000_000,
            weights_mib=942.3,
            perplexity=Estimate(48_940.2, 40_000, 60_000),
            bits_per_character=Estimate(4.9, 4.5, 5.3),
        ),
        ModelReport(
            key="student_after",
            label="student after",
            reference="org/student",
            parameters=494_000_000,
            weights_mib=942.3,
            perplexity=Estimate(15.12, 14.8, 15.4),
            bits_per_character=Estimate(1.392, 1.35, 1.45),
            tokens_per_s=141.2,
            peak_rss_mib=4120,
        ),
    ]
    fields: dict[str, object] = {
        "schema": SCHEMA,
        "recipe": "stories",
        "fingerprint": "f",
        "created": "2026-01-01T00:00:00+00:00",
        "headline": Headline(text="student: 32% of the parameters"),
        "models": models,
        "rows": Rows(held_out=9, scored=9, left_out=0, prompts=8),
        "samples": [Sample(KOREAN, [Answer("teacher", KOREAN), Answer("student after", "짧아요.")])],
        "training": Training(),
        "filters": None,
        "lineage": {"generate": {"model": "org/teacher"}},
        "commands": ["python -m evaluate recipe.yaml"],
        "machine": {"cores": "2"},
        "versions": {"torch": "2"},
        "notes": ["a note"],
        **changes,
    }
    return Report(**fields)  # type: ignore[arg-type]


def printed(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def test_the_table_holds_every_figure_in_80_characters() -> None:
    text = printed(make_report())
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines) and "…" not in text
    scored, timed = [line.split() for line in lines if line.lstrip().startswith("teacher")]
    assert scored == ["teacher", "3.41", "1.112"]
    assert timed == ["teacher", "55.1", "–", "–", "7,312", "2,944", "1.54B", "–"]
    scored, timed = [line.split() for line in lines if "student before" in line]
    assert scored == ["student", "before", "48,940", "4.900"]
    assert timed == ["student", "before", *"–––", "–", "942", "494.0M", "–"]
    assert "3.20–3.60" in text and "a note" in text and "32% of the parameters" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (3.026, "3.03"), (45.23, "45.2"), (48940.2, "48,940"), (412345.0, "412k"), (1.26e6, "1.3M")],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_parameters_for_people() -> None:
    assert (millions(134_515_008), millions(1_543_714_304), millions(None)) == ("134.5M", "1.54B", "–")


def test_every_text_on_the_page_is_escaped() -> None:
    page = render_html(
        make_report(
            recipe=ATTACK,
            headline=Headline(text=ATTACK),
            samples=[Sample(ATTACK, [Answer(ATTACK, ATTACK)])],
            notes=[ATTACK],
            commands=[ATTACK],
            lineage={ATTACK: ATTACK},
            machine={ATTACK: ATTACK},
            filters=Filtering(rows=1, kept=0, keep_rate=0, rules=[RuleDrops(ATTACK, 1)]),
            models=[ModelReport(key="teacher", label=ATTACK, reference=ATTACK)],
        )
    )
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 10


def test_the_page_stands_alone() -> None:
    page = render_html(make_report())
    assert '<html lang="en">' in page and 'name="viewport"' in page and "@media print" in page
    assert "keep-all" in page and "Noto Sans KR" in page and KOREAN in page
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", page)


def test_what_was_not_measured_leaves_no_empty_section() -> None:
    bare = [ModelReport(key="teacher", label="teacher", reference="t", missing="elsewhere")]
    page = render_html(make_report(models=bare, samples=[], lineage={}))
    for heading in ("Quality, speed", "Loss in training", "Dropped by", "side by side", "lineage.json"):
        assert heading not in page
    full = make_report(
        training=Training(loss=[LossPoint(1, 3.0), LossPoint(2, 2.0)]),
        filters=Filtering(rows=10, kept=8, keep_rate=0.8, rules=[RuleDrops("length", 2)]),
    )
    page = render_html(full)
    for heading in ("Quality, speed", "Loss in training", "Dropped by", "side by side", "lineage.json"):
        assert heading in page
    assert "8 of 10 answers kept (80.0%)" in page


def test_bars_are_as_long_as_their_figures() -> None:
    groups = {group.title: group.bars for group in bar_groups(make_report())}
    speed = groups["Speed"]
    assert [bar.label for bar in speed] == ["teacher", "student after"]
    assert speed[1].width == 100 and speed[0].width == pytest.approx(39.04)
    bits = groups["Bits per character"]
    assert bits[1].high == 100 and bits[1].width == pytest.approx(92.45)  # of the highest interval end
    assert bits[2].text == "1.39" and groups["Parameters"][0].text == "1.54B"


def test_perplexities_far_apart_are_drawn_on_a_logarithmic_scale_from_one() -> None:
    (group,) = [group for group in bar_groups(make_report()) if group.title == "Perplexity"]
    assert "logarithmic" in group.hint
    assert group.bars[1].high == 100 and group.bars[0].width == pytest.approx(100 * math.log(3.412, 60_000), abs=0.01)
    near = [msgspec.structs.replace(m, perplexity=Estimate(2.0, 1.5, 4.0)) for m in make_report().models]
    (group,) = [group for group in bar_groups(make_report(models=near)) if group.title == "Perplexity"]
    assert "logarithmic" not in group.hint and group.bars[0].width == 50


def test_drops_come_largest_first_and_only_where_there_are_any() -> None:
    rules = [RuleDrops("length", 5), RuleDrops("script_ratio", 0), RuleDrops("finish_reason", 20)]
    bars = drop_bars(Filtering(rows=30, kept=5, keep_rate=1 / 6, rules=rules))
    assert [(bar.label, bar.text, bar.width) for bar in bars] == [("finish_reason", "20", 100), ("length", "5", 25)]
    assert drop_bars(None) == []


def test_the_loss_curve_is_drawn_to_scale() -> None:
    training = Training(
        loss=[LossPoint(0, 4.0), LossPoint(50, 3.0), LossPoint(100, 2.0)],
        eval=[LossPoint(100, 2.5), LossPoint(50, float("nan"))],
    )
    chart = loss_chart(training)
    assert isinstance(chart, LossChart)
    assert [tick.label for tick in chart.y] == ["2", "2.5", "3", "3.5", "4"]
    assert (chart.y[0].at, chart.y[-1].at) == (100, 0)
    assert chart.train == "M0.0 0.0 L50.0 50.0 L100.0 100.0"
    assert chart.eval_dots == [(100, 75)]
    assert loss_chart(Training(loss=[LossPoint(1, 2.0)])) is None
