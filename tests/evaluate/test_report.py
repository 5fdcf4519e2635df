"""What the report shows: the table, the page in a browser, its charts. Figures are made up; nothing is measured."""

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from evaluate.document import (
    Estimate,
    FilterSummary,
    LossPoint,
    ModelReport,
    ProbeSet,
    Report,
    Rows,
    RuleDrops,
    TrainingLog,
    millions,
    number,
    percent,
)
from evaluate.measure.results import Results
from evaluate.report.charts import LossChart, axis_panels, drop_bars, loss_chart
from evaluate.report.html import lang_of, render_html
from evaluate.report.notes import of_probes
from evaluate.report.tables import VERDICTS, measured, nodes, print_report, probes, promise, wins
from pipeline.recipe import Recipe
from tests.evaluate.made_report import ATTACK, KOREAN, full_report, make_report, verified_report

CHROMIUM = "/usr/bin/chromium"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]


def printed(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def test_the_table_holds_every_figure_in_80_characters() -> None:
    text = printed(make_report())
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines) and "…" not in text
    shown = {line.strip()[:18].strip(): line[19:].split() for line in lines}
    head = next(number for number, line in enumerate(lines) if line.lstrip().startswith("test answers"))
    names = "student test answers teacher before student after"
    assert " ".join(" ".join(lines[head - 1 : head + 1]).split()) == names
    assert shown["perplexity"] == ["3.41", "48,940", "15.1"]
    assert shown["bits per character"] == ["1.112", "4.900", "1.392"]
    assert [line.split()[-3:] for line in lines if "tokens/s, saturated" in line] == [["55.1", "–", "141.2"]]
    assert shown["peak memory, MiB"] == ["7,312", "–", "4,120"] and shown["weights, MiB"] == ["2,944", "942", "942"]
    assert shown["parameters"] == ["1.54B", "494.0M", "494.0M"]
    assert "tokens/s, alone" not in text and "KV bytes" not in text  # nobody has it
    assert "3.20–3.60" in text and "a note" in text and "32% of the parameters" in text


def test_many_models_are_printed_in_more_tables() -> None:
    models = make_report().models
    others = [msgspec.structs.replace(models[0], key=f"other_{n}", label=f"other model {n}") for n in range(1, 4)]
    lines = printed(make_report(models=[*models, *others])).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[1:] for line in lines if line.strip().startswith("parameters")] == [
        ["1.54B", "494.0M", "494.0M", "1.54B"],
        ["1.54B", "1.54B"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.58e-7, "2.6e-07"),
        (0.0, "0.00"),
        (3.026, "3.03"),
        (45.23, "45.2"),
        (48940.2, "48,940"),
        (412345.0, "412k"),
        (1.26e6, "1.3M"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0%"),
        (1 / 300, "0.3%"),
        (0.624, "62%"),
        (299 / 300, "99.7%"),
        (1.0, "100%"),
        (1.004, "100.4%"),
        (12.0, "1,200%"),
    ],
)
def test_a_share_is_called_none_or_all_only_where_it_is(value: float, text: str) -> None:
    assert percent(value) == text


def test_parameters_for_people() -> None:
    assert (millions(134_515_008), millions(1_543_714_304)) == ("134.5M", "1.54B")


def test_every_text_on_the_page_is_escaped() -> None:
    page = render_html(verified_report(ATTACK, words=ATTACK + KOREAN))
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 50


def test_the_page_stands_alone() -> None:
    page = render_html(make_report())
    assert '<html lang="en">' in page and 'name="viewport"' in page and "@media print" in page
    assert "keep-all" in page and "Noto Sans KR" in page and KOREAN in page
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?://", page)


def test_names_that_look_like_markup_are_printed_as_they_are() -> None:
    report = verified_report(" [/kg] [red]")
    assert "count [/kg] [red]" in printed(report)


def test_a_category_does_not_steer_the_terminal() -> None:
    report = verified_report()
    assert report.accuracy is not None
    categories = {"a\x1b[2J[/]": report.accuracy.categories["join, unseen"]}
    said = printed(
        msgspec.structs.replace(report, accuracy=msgspec.structs.replace(report.accuracy, categories=categories))
    )
    assert "\x1b" not in said and "a\\x1b[2J[/]" in said


def test_right_answers_come_first_and_stand_by_model_category_and_reason() -> None:
    report = verified_report()
    lines = [line.strip() for line in printed(report).splitlines()]
    assert all(len(line) <= 80 for line in lines) and "…" not in "".join(lines)
    shares = next(line for line in lines if line.startswith("right answers"))
    assert shares.split()[2:] == ["84.0%", "12.0%", "81.0%", "30.0%"]
    first = [next(i for i, line in enumerate(lines) if name in line) for name in ("right answers", "perplexity")]
    assert first == sorted(first)
    assert next(line for line in lines if "over the teacher's" in line).split()[-1] == "96.0%"
    assert next(line for line in lines if line.startswith("sql: result")).split()[2:] == ["10%"] * 4
    page = render_html(report)
    headings = ("Right answers", "Three axes", "All figures", "Right and wrong, side by side", "The same prompt")
    assert [page.index(heading) for heading in headings] == sorted(page.index(heading) for heading in headings)
    assert "count" in page and "join, unseen" in page and '<p class="remark">wrong</p>' in page
    assert [(panel.title, panel.hint[:7]) for panel in axis_panels(report)][:2] == [
        ("Quality", "right a"),
        ("Speed", "answers"),
    ]
    assert "Right answers" not in render_html(full_report())


HEADINGS = ["The promise", "Three axes", "Answers to new prompts", "Win rate", "side by side"]
HEADINGS += ["Loss in training", "Dropped by", "Checklist", "What it cost", "lineage.json"]


def test_a_figure_of_lm_eval_without_a_standard_error_has_no_interval() -> None:
    found = {"ifeval prompt": Estimate(0.42, 0.38, 0.46), "ifeval inst": Estimate(0.53, 0.53, 0.53)}
    report = make_report(tasks={name: {"teacher": own} for name, own in found.items()})
    (table,) = (table for table in measured(report) if table.title.startswith("other tasks"))
    assert [[line.text for line in row.cells[0]] for row in table.rows] == [["0.42", "0.38–0.46"], ["0.53"]]


def test_what_was_not_measured_leaves_no_empty_section() -> None:
    bare = [ModelReport(key="teacher", label="teacher", reference="t", missing="elsewhere")]
    page = render_html(make_report(models=bare, samples=[], lineage={}))
    assert [heading for heading in HEADINGS if heading in page] == []
    page = render_html(full_report())
    assert [heading for heading in HEADINGS if heading not in page] == []
    assert "1,200 of 2,000 answers kept (60.0%)" in page and "0.001 USD" in page  # 1.2 USD for 1,200 rows


def test_the_money_of_all_turns_is_told() -> None:
    """`prompts.user`: the section has the last turn's spending, and what the turns before it and the user cost."""
    asked = {
        "spent": {"tokens": 5947, "usd": 0.0155},
        "user": {"model": "u", "spent_before": {"tokens": 60053, "usd": 0.2978}},
        "prompt_tokens": 5347,
    }
    page = render_html(make_report(lineage={"generate": asked}))
    assert "66,000, failed attempts and the turns before counted" in page
    assert "0.3133 USD" in page and "0.0155 USD" not in page
    assert "prompt tokens of the last turn" in page


def test_a_price_that_is_not_known_says_nothing_of_where_the_teacher_ran() -> None:
    asked = {"endpoints": ["https://api.example/v1"], "spent": {"tokens": 7, "usd": None}}
    page = render_html(make_report(lineage={"generate": asked}))
    assert "<dt>money</dt><dd>no price is known</dd>" in page


def test_the_prompts_that_were_asked_are_called_what_they_are() -> None:
    report = full_report()
    assert report.probes
    for source, unseen, told in (
        ("slots", 32, "64 new prompts, 32 with values never seen"),
        ("test", 0, "64 test prompts"),
    ):
        asked = msgspec.structs.replace(report.probes, source=source, unseen=unseen)
        shown = msgspec.structs.replace(report, probes=asked)
        page, kind = render_html(shown), told.split(", ")[0].removeprefix("64 ")
        assert f"; {told}" in page and f"Answers to {kind}" in page and "nobody was asked" not in page
        assert told in printed(shown).splitlines()[0]


def test_prompts_that_some_model_lacks_an_answer_or_a_score_for_are_told() -> None:
    recipe = Recipe(name="t", teacher={"model": "m"}, prompts={"template": "{a}", "slots": {"a": ["x"]}, "count": 1})
    probes = ProbeSet(source="test", seen=64, unseen=0, answered=64, judge="j", judged=64)
    few = msgspec.structs.replace(probes, answered=60, judged=32)
    whole, notes = (list(of_probes(recipe, Results({}, {}, {}, {}, {}, {}), own)) for own in (probes, few))
    assert [note for note in notes if note not in whole] == [
        "The probes' figures are over the 60 of 64 that every model answered.",
        "The judge's means are over the 32 of 60 prompts for which it scored every model.",
    ]


def test_the_promise_is_shown_part_by_part() -> None:
    rows = promise(full_report()).rows
    assert [[[line.text for line in cell] for cell in row.cells] for row in rows] == [
        [["90%"], ["92.0%", "90.0%–94.0%"], ["yes"]],
        [["90%"], ["87.0%", "78.0%–95.0%"], ["not shown"]],
        [["90%"], ["–"], ["not measured"]],
        [["3×"], ["3.12×"], ["yes"]],
        [["3×"], ["2.56×"], ["no"]],
    ]
    assert [row.cells[2][0].mark for row in rows] == ["pass", "warn", "unknown", "pass", "fail"]
    assert VERDICTS[full_report().headline.holds] == ("the promise does not hold", "fail")
    assert promise(make_report()).rows == []


def test_a_part_that_too_few_prompts_show_says_so() -> None:
    report = full_report()
    claim = msgspec.structs.replace(report.headline.claims[0], verdict="not shown", why="under 60 prompts")
    headline = msgspec.structs.replace(report.headline, claims=[claim])
    few = msgspec.structs.replace(report, headline=headline)
    assert [line.text for line in promise(few).rows[0].cells[2]] == ["not shown", "under 60 prompts"]
    assert ">not shown</span><small>under 60 prompts</small></td>" in render_html(few)


def test_models_stand_on_three_axes_by_their_ratio_to_the_teacher() -> None:
    """One logarithmic scale for all: the ends are 1.1119 / 4.9 = 0.227 and the weights' 3.12, a little room beyond."""
    charts = {chart.title: chart for chart in axis_panels(make_report())}
    assert list(charts) == ["Quality", "Speed", "Memory"]
    quality, speed = charts["Quality"], charts["Speed"]
    assert [dot.text for dot in quality.marks] == ["1.00×", "0.23×", "0.80×"]
    assert [dot.text for dot in speed.marks] == ["1.00×", "2.56×"] and speed.marks[0].at == speed.one == quality.one
    low, high = math.log(1.1119 / 4.9 / 1.15), math.log(2944.4 / 942.3 * 1.15)
    assert speed.goal == pytest.approx(100 * (math.log(3) - low) / (high - low), abs=0.01)
    assert quality.goal and quality.one and speed.goal
    assert 0 < quality.marks[1].at < quality.goal < quality.one < speed.marks[1].at < speed.goal < 100
    assert axis_panels(make_report(models=make_report().models[1:])) == []  # no teacher, no axis


def test_a_difference_is_called_better_only_where_it_is_for_sure() -> None:
    table, unseen, broken = probes(full_report())
    after = {row.name: row.cells[2] for row in table.rows}
    assert [line.text for line in after["passes every rule"]] == ["71%", "61%–81%", "better than before"]
    assert [line.mark for line in after["loops"]] == ["", "", "better"]
    assert [line.mark for line in after["named of what was asked for"]] == ["", ""]
    assert unseen.title.startswith("32 prompts with values unseen")
    assert [(row.name, [cell[0].text for cell in row.cells]) for row in broken.rows] == [
        ("length", ["18%", "69%", "29%"]),
        ("script_ratio", ["3%", "3%", "3%"]),
    ]


def test_how_many_of_the_teachers_test_answers_passed_is_said() -> None:
    rows = Rows(test=9, scored=9, left_out=0, prompts=8, teacher_answers=12, teacher_kept=9)
    assert "75% of the teacher’s answers to the test prompts pass the filters" in render_html(make_report(rows=rows))
    assert "pass the filters" not in render_html(make_report())


def test_wins_ties_and_losses_fill_the_bar() -> None:
    (_, title, _), (_, _, counts) = wins(full_report())
    assert title == "student after against teacher: 43% (30%–55%)" and "70 won" in counts
    page = render_html(full_report())
    widths = [
        f'class="{name}" style="width: {share}%"' for name, share in (("won", 25.0), ("tied", 36.0), ("lost", 39.0))
    ]
    assert [width for width in widths if width not in page] == []


@pytest.mark.parametrize(
    ("text", "code"), [("토끼", "ko"), ("a story of 토끼", "ko"), ("うさぎの話", "ja"), ("兔子", "zh"), ("rabbit", "")]
)
def test_a_text_is_set_in_its_language(text: str, code: str) -> None:
    assert lang_of(text) == code


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert Path(CHROMIUM).exists(), "the page is tested in a real browser: install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_runs_over_the_edge(width: int, browser: Browser, tmp_path: Path) -> None:
    """Not with plain figures, and not with very long words and hostile texts. Nothing is fetched, nothing runs."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name, report in (
        ("full", full_report()),
        ("verified", verified_report()),
        ("hostile", verified_report(ATTACK + "x" * 300, "가" * 300 + ATTACK)),
    ):
        file = tmp_path / f"{name}.html"
        file.write_text(render_html(report), encoding="utf-8")
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        over = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        outside = f"{over}.filter(e => !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 80))"
        assert page.evaluate(outside) == [], name
        if name == "full":
            assert page.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
            assert page.evaluate("getComputedStyle(document.querySelector('.prompt')).wordBreak") == "keep-all"
            assert page.get_attribute(".prompt", "lang") == "ko"
    assert page.query_selector("script, img, iframe") is None
    assert all(url.startswith("file:") for url in asked) and len(asked) == 3
    page.close()


def test_on_paper_a_long_answer_takes_no_pages_and_the_lineage_none(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(render_html(full_report(words="토끼가 숲으로 갔어요. " * 200)), encoding="utf-8")
    page = browser.new_page(viewport={"width": 700, "height": 1000})
    page.goto(file.as_uri())
    heights = "[...document.querySelectorAll('.answers p')].map(e => e.getBoundingClientRect().height)"
    page.emulate_media(media="print")
    assert max(page.evaluate(heights)) < 400
    assert not page.is_visible("details pre") and page.is_visible("summary")
    page.emulate_media(media="screen")
    assert page.is_visible("details pre")
    page.close()


def test_drops_come_largest_first_and_only_where_there_are_any() -> None:
    rules = [RuleDrops("length", 5), RuleDrops("script_ratio", 0), RuleDrops("finish_reason", 20)]
    bars = drop_bars(FilterSummary(rows=30, kept=5, keep_rate=1 / 6, rules=rules))
    assert [(bar.label, bar.text, bar.at) for bar in bars] == [("finish_reason", "20", 100), ("length", "5", 25)]
    assert drop_bars(None) == []


def test_the_loss_curve_is_drawn_to_scale() -> None:
    training = TrainingLog(
        loss=[LossPoint(0, 4.0), LossPoint(50, 3.0), LossPoint(100, 2.0)],
        eval=[LossPoint(100, 2.5), LossPoint(50, float("nan"))],
    )
    chart = loss_chart(training)
    assert isinstance(chart, LossChart)
    assert [label for _, label in chart.y] == ["2", "2.5", "3", "3.5", "4"]
    assert (chart.y[0][0], chart.y[-1][0]) == (100, 0)
    assert chart.train == [(0, 0), (50, 50), (100, 100)]
    assert chart.eval == [(100, 75)]
    assert loss_chart(TrainingLog(loss=[LossPoint(1, 2.0)])) is None


def test_what_each_node_of_a_cluster_has_done_is_in_a_table() -> None:
    assert "Throughput by node" not in render_html(full_report())
    first = {"answered": 1200, "prompt_tokens": 9, "completion_tokens": 36_000, "active_s": 600.0}
    first |= {"retried": 7, "asked_again": 31}
    lineage = {"generate": {"nodes": {"10.0.0.2": first, "10.0.0.1": {}}}}
    table = nodes(make_report(lineage=lineage))
    assert table and table.heads == ["answers", "tokens", "active", "answers/s", "tokens/s", "retried", "asked again"]
    assert [(row.name, [cell[0].text for cell in row.cells]) for row in table.rows] == [
        ("10.0.0.1", ["0", "0", "0:00", "0.0", "0.0", "0", "0"]),
        ("10.0.0.2", ["1,200", "36,000", "10:00", "2.0", "60.0", "7", "31"]),
    ]
    page = render_html(make_report(lineage=lineage))
    assert "Throughput by node" in page and "<td>36,000</td>" in page
