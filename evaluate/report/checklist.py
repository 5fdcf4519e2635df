"""`python -m evaluate.report.checklist RECIPE [--run DIR]`: eight points of a good run, six common failures.

Reads filter_report.json, checks.json, lineage.json, a person's review and report.json. Works on a run at any stage:
what was not measured yet is unknown. If there is a report of the student that is there, its section `checklist` and
report.html are written again. Ends with 1 if a point fails; with --strict also if one warns or is unknown.

    pass   measured, and as wanted            warn      advice, or met in part
    fail   measured, and not as wanted        unknown   not measured yet, or cannot be known here
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluate.document import MEASURES, Claim, Report, percent
from evaluate.figures.promise import AXES
from evaluate.report.evidence import Evidence, gather, report_of_student
from evaluate.report.html import publish
from pipeline.advice import ADVISED_ROWS, BALANCED_SIZES, DISTINCT_SHARE, FAIR_START, REVIEWED_ROWS, SAFE_KEEP_RATE
from pipeline.checks import COLOURS, Check, Checklist, Status
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import BEFORE, TEACHER

LOWEST, HIGHEST = BALANCED_SIZES
FEWEST, MOST = ADVISED_ROWS
SAFE_DUPLICATES = 0.1  # share of the answers that say the same as another
ABLE = 0.5  # share of the teacher's answers that must name what was asked for
IN_LANGUAGE = (0.5, 0.9)  # share of the answers in the wanted script: under the first it fails, the second it warns
REVIEW = "make review"
SCRIPT_RULES = ("script_ratio", "language", "foreign_script")  # what they drop is not in the wanted language


Found = tuple[Status, float | None, str, str]  # status, value, finding, fix


def check_run(recipe: Recipe, run: RunDir, report: Report | None) -> Checklist:
    """The checklist of a run, from its files and its report. Raises DataError at a file that is wrong."""
    return checklist(gather(recipe, run, report))


def checklist(seen: Evidence) -> Checklist:
    """Compares the evidence with what is wanted; pure."""

    def check(point: Point) -> Check:
        status, value, finding, fix = point.look(seen) or ("unknown", None, *point.missing)
        fix = "" if status == "pass" else fix
        return Check(name=point.name, wanted=point.wanted, status=status, value=value, finding=finding, fix=fix)

    return Checklist(points=[check(point) for point in POINTS], failures=[check(point) for point in FAILURES])


def _size(seen: Evidence) -> Found | None:
    if (ratio := _size_ratio(seen)) is None:
        return None
    status: Status = "pass" if LOWEST <= ratio <= HIGHEST else "warn" if 1 <= ratio < LOWEST else "fail"
    fix = "take a smaller student: it saves more" if ratio < LOWEST else "take a model of a size between"
    return status, ratio, f"{ratio:.1f} times", fix


def _ability(seen: Evidence) -> Found | None:
    """Whether the teacher can do what it is to teach."""
    filters = seen.filters
    if filters is None or filters.pass_rules is None:
        return None
    finding, value = f"{percent(filters.pass_rules)} pass the rules", filters.pass_rules
    failing = {_plain(label): share for label, share in filters.failing.items()}
    teacher = next((m for m in seen.report.models if m.key == TEACHER), None) if seen.report else None
    probed = teacher.figure("all", "adherence") if teacher else None
    adherence, where = (probed.value if probed else None), "probes"
    if "adherence" in failing:
        adherence, where = 1 - failing["adherence"], "the rule adherence"
    if adherence is not None:
        value = min(value, adherence)
        finding += f", {percent(adherence)} name all that was asked for ({where})"
    elif seen.recipe.prompts.slots:
        finding += "; whether they name what was asked for is not measured"
        if value >= ABLE:
            return "warn", value, finding, "give the rule adherence its slots, or evaluate"
    fix = "fix the prompts, or take a teacher that can do this"
    return "pass" if value >= ABLE else "fail", value, finding, fix


def _rows(seen: Evidence) -> Found | None:
    if (filters := seen.filters) is None:
        return None
    kept = filters.kept
    status: Status = "fail" if kept < FAIR_START else "pass" if FEWEST <= kept <= MOST else "warn"
    fix = "raise prompts.count" if kept < FEWEST else "more rows than these seldom teach more"
    return status, kept, f"{kept:,} of {filters.rows:,} answers", fix


def _keep_rate(seen: Evidence) -> Found | None:
    if (filters := seen.filters) is None:
        return None
    rate = filters.keep_rate
    fix = "see which rules drop what in filter_report.json; fix the prompts, or take another teacher"
    return "pass" if rate >= SAFE_KEEP_RATE else "fail", rate, f"{rate:.1%}", fix


def _review(seen: Evidence) -> Found | None:
    """Counts what a person has judged; if the person rejects most of what was kept, the rows are bad."""
    if seen.review is None:
        return None
    done = seen.review.reviewed - seen.review.gone
    enough = min(REVIEWED_ROWS, seen.filters.rows if seen.filters else REVIEWED_ROWS)
    finding = f"{done} reviewed"
    precision = next((row.precision for row in seen.review.agreements if row.decider == "filters"), None)
    if precision is not None:
        finding += f"; the person accepts {percent(precision.value)} of what was kept"
        if precision.value < SAFE_KEEP_RATE:
            return "fail", done, finding, "make the filters as strict as the person"
    return "pass" if done >= enough else "warn", done, finding, REVIEW


def _student(seen: Evidence) -> Found | None:
    """Right answers, else perplexity and probes of the student: better than before training, with intervals."""
    if (report := seen.report) is None:
        return None
    fix = "look at the loss curve and the samples: more rows, more epochs or another learning rate"
    for d in report.differences:
        if (d.against, d.part, d.figure) == (BEFORE, "verified", "accuracy"):
            status: Status = "warn" if d.improved is None else "pass" if d.improved else "fail"
            return status, d.change.value, f"right answers: {MEASURES[d.figure].told_change(d.change)}", fix
    ratio = report.headline.perplexity_after_over_before
    if ratio is None:
        return None
    finding = f"perplexity times what it was: {ratio.told()}"
    changes = [d for d in report.differences if d.against == BEFORE and d.part == "all" and d.better]
    better, worse = ([d.figure.replace("_", " ") for d in changes if d.improved is way] for way in (True, False))
    if changes:
        finding += f"; probes better in {', '.join(better) or 'nothing'}"
        finding += f", worse in {', '.join(worse)}" if worse else ""
    if ratio.low >= 1:
        return "fail", ratio.value, finding, fix
    if not changes:
        return "warn", ratio.value, f"{finding}; no probes", "evaluate with probes"
    return "pass" if ratio.high < 1 and better and not worse else "warn", ratio.value, finding, fix


def _axes(seen: Evidence) -> Found | None:
    """Teacher against student: each part of the promise, by its axis."""
    if (report := seen.report) is None:
        return None
    claims = [claim for claim in report.headline.claims if claim.value]
    missing = [axis for axis in AXES if not any(claim.axis == axis for claim in claims)]
    finding = "; ".join(map(_told, claims)) or "nothing is measured"
    missed, undecided = ([c.name for c in claims if c.verdict == verdict] for verdict in ("no", "not shown"))
    if missed:
        fix = f"the promise does not hold for this run ({', '.join(missed)}): do not claim it"
        return "fail", len(claims), finding, fix
    if missing:
        return "unknown", None, f"{finding}; not measured: {', '.join(missing)}", "evaluate teacher and student"
    fix = f"not shown: {', '.join(undecided)}; evaluate on more rows and probes"
    return "warn" if undecided else "pass", len(claims), finding, fix


def _licence(seen: Evidence) -> Found | None:
    return _as_training_found(seen.checks.get("licence"))


def _as_training_found(found: Check | None) -> Found | None:
    """A point that the checks before training have answered; their advice is a warning here."""
    if found is None:
        return None
    return "warn" if found.status == "note" else found.status, found.value, found.finding, found.fix


def _unfiltered(seen: Evidence) -> Found | None:
    if (filters := seen.filters) is None:
        return None
    if filters.rules is None:
        return "unknown", None, "the lineage does not say which rules were asked", "filter again"
    finding = f"{filters.rules} rules judged {filters.rows:,} answers" if filters.rules else "the filters had no rule"
    return (
        "pass" if filters.rules else "fail",
        filters.rules,
        finding,
        "a teacher's faults are copied too: name filters.rules",
    )


def _too_large(seen: Evidence) -> Found | None:
    if (ratio := _size_ratio(seen)) is None:
        return None
    fix = "take a teacher of a size between, or a larger student"
    return "pass" if ratio <= HIGHEST else "fail", ratio, f"{ratio:.1f} times", fix


def _chain(seen: Evidence) -> Found | None:
    found = seen.checks.get("chain")
    if found and found.status == "note" and found.value is None:
        return "unknown", None, found.finding, found.fix
    return _as_training_found(found)


def _domain_shift(seen: Evidence) -> Found | None:
    failing = seen.filters.failing if seen.filters else {}
    found = {rule: 1 - share for rule, share in failing.items() if _plain(rule) in SCRIPT_RULES}
    if not found:
        return None
    worst = min(found.values())
    status: Status = "fail" if worst < IN_LANGUAGE[0] else "warn" if worst < IN_LANGUAGE[1] else "pass"
    finding = ", ".join(f"{share:.1%} pass {rule}" for rule, share in found.items())
    return status, worst, finding, "take a teacher that speaks it, or say so in prompts.system"


def _same_prompts(seen: Evidence) -> Found | None:
    share, twins = seen.distinct_prompts, seen.filters.duplicates if seen.filters else None
    if share is None:
        return None
    finding = f"{percent(share)} of the prompts are different"
    finding += "; duplicates were not looked for" if twins is None else f", {twins:.1%} of the answers are duplicates"
    fix = "add slots or values to prompts.template, or raise sampling.temperature"
    if share < DISTINCT_SHARE:
        return "fail", share, finding, fix
    if twins is None:
        return "warn", share, finding, "set filters.dedup, and filter"
    return "warn" if twins > SAFE_DUPLICATES else "pass", share, finding, fix


def _beats_teacher(seen: Evidence) -> Found | None:
    """A student is bounded by its teacher: a quality over 100% is a reason to look twice, not to rejoice."""
    if (report := seen.report) is None:
        return None
    claims = {}
    for claim in (c for c in report.headline.claims if c.axis == "quality"):
        if own := claim.value:  # right answers are counted: there, what chance may explain is no reason
            claims[_told(claim)] = min(own.value, max(own.low, 1)) if claim.name == "quality_accuracy" else own.value
    rates = [win.rate.value for win in report.wins if win.against == TEACHER and win.rate]
    quality = claims | {f"wins {percent(rate)} of the pairs": 2 * rate for rate in rates}  # 1: the teacher's
    if not quality:
        return None
    most = max(quality.values())
    if most <= 1:
        return "pass", most, f"at most {percent(most)} of the teacher's", ""
    fix = "look for test prompts that were trained on, for a judge with a taste, and for rules that ask too little"
    return "warn", most, f"suspicious: {'; '.join(said for said, times in quality.items() if times > 1)}", fix


def _size_ratio(seen: Evidence) -> float | None:
    """Teacher's parameters over the student's: as the checks before training counted them, else as measured."""
    check = seen.checks.get("size_ratio")
    if check is not None and check.value is not None:
        return check.value
    claims = seen.report.headline.claims if seen.report else []
    return next((claim.value.value for claim in claims if claim.name == "size" and claim.value), None)


def _plain(label: str) -> str:
    """A rule's name: its label without the number of one that stands twice."""
    return label.partition("#")[0]


def _told(claim: Claim) -> str:
    return f"{claim.name.replace('_', ' ')} {claim.value.told('{:.2f}'.format) if claim.value else ''}"


class Point(NamedTuple):
    name: str
    wanted: str
    look: Callable[[Evidence], Found | None]  # None: the run does not have it yet
    missing: tuple[str, str]  # then: what to say, and what to do


UNFILTERED = "the answers are not filtered", "run the filters"
UNSIZED = "the sizes are not known", "train: it counts both models' parameters"
UNCHECKED = "not checked yet", "train: its checks come first"
UNCOMPARED = "quality is not compared with the teacher's", "evaluate"
UNSEEN = "no rule looks at it", "name a rule script_ratio or language in filters.rules, and filter"

ABLE_WANTED = f"{percent(ABLE)} of its answers pass the rules, and name what was asked for"
AXES_WANTED = "measured against the teacher: 90% of its quality, 3 times smaller and faster"
SCRIPT_WANTED = f"{percent(IN_LANGUAGE[1])} of the answers in the wanted script or language"
POINTS = (
    Point("size ratio", f"a teacher {LOWEST} to {HIGHEST} times larger", _size, UNSIZED),
    Point("teacher's ability", ABLE_WANTED, _ability, UNFILTERED),
    Point("rows", f"{FEWEST:,} to {MOST:,} kept rows; {FAIR_START} are a fair start", _rows, UNFILTERED),
    Point("keep rate", f"{percent(SAFE_KEEP_RATE)} or more kept", _keep_rate, UNFILTERED),
    Point("human review", f"{REVIEWED_ROWS} answers reviewed by a person", _review, ("no answer is reviewed", REVIEW)),
    Point("student's quality", "better than before training", _student, ("the student is not evaluated", "evaluate")),
    Point("three axes", AXES_WANTED, _axes, ("nothing is measured", "evaluate teacher and student")),
    Point("licence chain", "the teacher's terms allow it, and what they ask is done", _licence, UNCHECKED),
)
FAILURES = (
    Point("1 no filter", "the answers went through rules", _unfiltered, UNFILTERED),
    Point("2 teacher far larger", f"at most {HIGHEST} times the student", _too_large, UNSIZED),
    Point("3 distilling the distilled", "a teacher that was not itself distilled", _chain, UNCHECKED),
    Point("4 domain shift", SCRIPT_WANTED, _domain_shift, UNSEEN),
    Point("5 same prompts", "different prompts and answers", _same_prompts, ("nothing is generated", "generate")),
    Point("6 student beats teacher", "no claim of more than the teacher's quality", _beats_teacher, UNCOMPARED),
)


def print_checklist(found: Checklist, console: Console) -> None:
    for title, points in (("checklist", found.points), ("common failures", found.failures)):
        table = Table("", title, "wanted", "found", pad_edge=False, box=None, padding=(0, 2, 1, 0))
        for point in points:
            text = Text(point.finding)
            if point.fix:
                text.append(f"\n→ {point.fix}", style="dim")
            table.add_row(Text(point.status, style=COLOURS[point.status]), point.name, point.wanted, text)
        console.print(table)
    counts = {status: sum(point.status == status for point in found.all) for status in COLOURS}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count), highlight=False)


def main(argv: list[str] | None = None) -> None:
    """Checks the run, prints the checklist, and puts it into the report if there is one."""
    parser = stage_parser("evaluate.report.checklist", "Compares a run, at any stage, with a good one.")
    parser.add_argument("--strict", action="store_true", help="end with 1 if a point warns or is unknown, too")
    recipe, run, options = parse_stage(parser, argv)
    run.check_there()
    report = report_of_student(run)
    found = check_run(recipe, run, report)
    print_checklist(found, Console())
    if report is not None and report.checklist != found:
        with run.locked():
            if report := report_of_student(run):  # perhaps another one by now
                publish(run, msgspec.structs.replace(report, checklist=check_run(recipe, run, report)))
    stopping = ("fail", "warn", "unknown") if options.strict else ("fail",)
    bad = [point.name for point in found.all if point.status in stopping]
    if bad:
        raise DistillError(f"{run.path}: not as wanted: {', '.join(bad)}")


if __name__ == "__main__":
    run_stage(main)
