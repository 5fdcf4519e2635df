"""`python -m evaluate.report.checklist RECIPE [--run DIR]`: eight points of a good run, six common failures.

Works on a run at any stage: what was not measured yet is unknown. Where there is a report, its section `checklist` and
report.html are written again. Ends with 1 where a point fails; with --strict also where one warns or is unknown.

    pass   measured, and as wanted            warn      advice, or met in part
    fail   measured, and not as wanted        unknown   not measured yet, or cannot be known here
"""

from collections.abc import Iterable, Iterator

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from evaluate.document import Claim, Difference, Report, number, read_report
from evaluate.report.evidence import SCRIPT_RULES, Evidence, gather
from evaluate.report.html import publish
from pipeline.advice import ADVISED_ROWS, BALANCED_SIZES, DISTINCT_SHARE, REVIEWED_ROWS, SAFE_KEEP_RATE
from pipeline.checks import Check, Checklist, Status
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

LOWEST, HIGHEST = BALANCED_SIZES
SAFE_DUPLICATES = 0.1  # share of the answers that say the same as another
ABLE = 0.5  # share of the teacher's answers that must name what was asked for
IN_LANGUAGE = (0.5, 0.9)  # share of the answers in the wanted script: under the first it fails, the second it warns
STATUSES: dict[str, Status] = {"pass": "pass", "note": "warn", "warn": "warn", "fail": "fail"}
COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "unknown": "dim"}
AXES = ("quality", "speed", "memory")


def check_run(recipe: Recipe, run: RunDir, report: Report | None) -> Checklist:
    """The checklist of a run, from its files and its report. Raises DataError at a file that is wrong."""
    return checklist(gather(recipe, run, report))


def checklist(seen: Evidence) -> Checklist:
    """Holds the evidence against what is wanted; pure."""
    points = (_size, _ability, _rows, _keep_rate, _review, _student, _axes, _licence)
    failures = (_unfiltered, _too_large, _chain, _domain_shift, _same_prompts, _beats_teacher)
    return Checklist(points=[check(seen) for check in points], failures=[check(seen) for check in failures])


def _size(seen: Evidence) -> Check:
    wanted, ratio = f"a teacher {LOWEST} to {HIGHEST} times larger", _size_ratio(seen)
    if ratio is None:
        return _unknown("size ratio", wanted, "the sizes are not known", "train: it counts both models' parameters")
    status: Status = "pass" if LOWEST <= ratio <= HIGHEST else "warn" if 1 <= ratio < LOWEST else "fail"
    fix = "take a smaller student: it saves more" if ratio < LOWEST else "take a model of a size between"
    return _point("size ratio", wanted, status, ratio, f"{ratio:.1f} times", fix)


def _ability(seen: Evidence) -> Check:
    """The chapter's second point: whether the teacher can do what it is to teach."""
    name, wanted = "teacher's ability", f"{ABLE:.0%} of its answers pass the rules, and name what was asked for"
    filters = seen.filters
    if filters is None or filters.pass_rules is None:
        return _unknown(name, wanted, "the answers are not filtered", "run the filters")
    adherence, where = _adherence(seen)
    finding = f"{filters.pass_rules:.0%} pass the rules"
    value = filters.pass_rules if adherence is None else min(filters.pass_rules, adherence)
    if adherence is not None:
        finding += f", {adherence:.0%} name all that was asked for ({where})"
    elif seen.recipe.prompts.slots:
        finding += "; whether they name what was asked for is not measured"
        if value >= ABLE:
            return _point(name, wanted, "warn", value, finding, "give the rule adherence its slots, or evaluate")
    fix = "fix the prompts, or take a teacher that can do this"
    return _point(name, wanted, "pass" if value >= ABLE else "fail", value, finding, fix)


def _rows(seen: Evidence) -> Check:
    low, high = ADVISED_ROWS
    wanted = f"{low:,} to {high:,} kept rows"
    if seen.filters is None:
        return _unknown("rows", wanted, "the answers are not filtered", "run the filters")
    kept = seen.filters.kept
    status: Status = "fail" if kept < low else "pass" if kept <= high else "warn"
    fix = "raise prompts.count" if kept < low else "more rows than these seldom teach more"
    return _point("rows", wanted, status, kept, f"{kept:,} of {seen.filters.rows:,} answers", fix)


def _keep_rate(seen: Evidence) -> Check:
    wanted = f"{SAFE_KEEP_RATE:.0%} or more kept"
    if seen.filters is None:
        return _unknown("keep rate", wanted, "the answers are not filtered", "run the filters")
    rate = seen.filters.keep_rate
    fix = "see which rules drop what in filter_report.json; fix the prompts, or take another teacher"
    return _point("keep rate", wanted, "pass" if rate >= SAFE_KEEP_RATE else "fail", rate, f"{rate:.1%}", fix)


def _review(seen: Evidence) -> Check:
    """Counts what a person has judged; where the person rejects most of what was kept, the rows are bad."""
    wanted, fix = f"{REVIEWED_ROWS} answers reviewed by a person", "make review"
    if seen.review is None:
        return _unknown("human review", wanted, "nobody has reviewed an answer", fix)
    done = seen.review.reviewed - seen.review.gone
    enough = min(REVIEWED_ROWS, seen.filters.rows if seen.filters else REVIEWED_ROWS)
    finding = f"{done} reviewed"
    precision = next((row.precision for row in seen.review.agreements if row.decider == "filters"), None)
    if precision is not None:
        finding += f"; the person accepts {precision.value:.0%} of what was kept"
        if precision.value < SAFE_KEEP_RATE:
            return _point("human review", wanted, "fail", done, finding, "make the filters as strict as the person")
    return _point("human review", wanted, "pass" if done >= enough else "warn", done, finding, fix)


def _student(seen: Evidence) -> Check:
    """Perplexity and probes of the student: better than before training, with intervals."""
    name, wanted = "student's quality", "perplexity and probes better than before training"
    report = seen.report
    ratio = report.headline.perplexity_after_over_before if report else None
    if report is None or ratio is None:
        return _unknown(name, wanted, "the student is not evaluated", "evaluate")
    finding = f"perplexity {number(ratio.value)} times what it was ({number(ratio.low)}–{number(ratio.high)})"
    changes = [d for d in report.differences if d.against == "student_before" and d.part == "all" and d.better]
    worse, better = (_figures(changes, improved=way) for way in (False, True))
    if changes:
        finding += f"; probes better in {better or 'nothing'}" + (f", worse in {worse}" if worse else "")
    fix = "look at the loss curve and the samples: more rows, more epochs or another learning rate"
    if ratio.low >= 1:
        return _point(name, wanted, "fail", ratio.value, finding, fix)
    if not changes:
        return _point(name, wanted, "warn", ratio.value, f"{finding}; no probes", "evaluate with probes")
    sure = ratio.high < 1 and better and not worse
    return _point(name, wanted, "pass" if sure else "warn", ratio.value, finding, fix)


def _axes(seen: Evidence) -> Check:
    """Teacher against student: each part of the promise, by its axis."""
    name, wanted = "three axes", "measured against the teacher: 90% of its quality, 3 times smaller and faster"
    claims = [claim for claim in seen.report.headline.claims if claim.value] if seen.report else []
    missing = [axis for axis in AXES if not any(claim.axis == axis for claim in claims)]
    finding = "; ".join(_told(claim) for claim in claims) or "nothing is measured"
    missed = [claim for claim in claims if claim.holds is False and not claim.undecided]
    if missed:
        fix = f"the promise does not hold for this run ({', '.join(claim.name for claim in missed)}): do not claim it"
        return _point(name, wanted, "fail", len(claims), finding, fix)
    if missing:
        return _unknown(name, wanted, f"{finding}; not measured: {', '.join(missing)}", "evaluate teacher and student")
    undecided = [claim.name for claim in claims if claim.undecided]
    fix = f"chance may explain {', '.join(undecided)}: evaluate on more rows and probes"
    return _point(name, wanted, "warn" if undecided else "pass", len(claims), finding, fix)


def _licence(seen: Evidence) -> Check:
    return _from_check(seen, "licence", "licence chain", "the teacher's terms allow it, and what they ask is done")


def _unfiltered(seen: Evidence) -> Check:
    name, wanted = "1 no filter", "the answers went through rules"
    if seen.filters is None:
        return _unknown(name, wanted, "the answers are not filtered", "run the filters")
    rules = len(seen.filters.rules)
    finding = f"{rules} rules judged {seen.filters.rows:,} answers" if rules else "the filters had no rule"
    fix = "a teacher's faults are copied too: name filters.rules"
    return _point(name, wanted, "pass" if rules else "fail", rules, finding, fix)


def _too_large(seen: Evidence) -> Check:
    name, wanted, ratio = "2 teacher far larger", f"at most {HIGHEST} times the student", _size_ratio(seen)
    if ratio is None:
        return _unknown(name, wanted, "the sizes are not known", "train: it counts both models' parameters")
    fix = "take a teacher of a size between, or a larger student"
    return _point(name, wanted, "pass" if ratio <= HIGHEST else "fail", ratio, f"{ratio:.1f} times", fix)


def _chain(seen: Evidence) -> Check:
    return _from_check(seen, "chain", "3 distilling the distilled", "a teacher that was not itself distilled")


def _domain_shift(seen: Evidence) -> Check:
    name, wanted = "4 domain shift", f"{IN_LANGUAGE[1]:.0%} of the answers in the wanted script or language"
    found = {rule: 1 - share for rule, share in _failing(seen) if _plain(rule) in SCRIPT_RULES}
    if not found:
        return _unknown(
            name, wanted, "no rule looks at it", "name a rule script_ratio or language in filters.rules, and filter"
        )
    worst = min(found.values())
    status: Status = "fail" if worst < IN_LANGUAGE[0] else "warn" if worst < IN_LANGUAGE[1] else "pass"
    finding = ", ".join(f"{share:.1%} pass {rule}" for rule, share in found.items())
    return _point(name, wanted, status, worst, finding, "take a teacher that speaks it, or say so in prompts.system")


def _same_prompts(seen: Evidence) -> Check:
    name, wanted = "5 same prompts", "different prompts, and few answers that say the same"
    share, twins = seen.distinct_prompts, seen.filters.duplicates if seen.filters else None
    if share is None:
        return _unknown(name, wanted, "nothing is generated", "generate")
    finding = f"{share:.0%} of the prompts are different"
    finding += "; duplicates were not looked for" if twins is None else f", {twins:.1%} of the answers are duplicates"
    fix = "add slots or values to prompts.template, or raise sampling.temperature"
    if share < DISTINCT_SHARE:
        return _point(name, wanted, "fail", share, finding, fix)
    if twins is None:
        return _point(name, wanted, "warn", share, finding, "set filters.dedup, and filter")
    return _point(name, wanted, "warn" if twins > SAFE_DUPLICATES else "pass", share, finding, fix)


def _beats_teacher(seen: Evidence) -> Check:
    """A student is bounded by its teacher: a quality over 100% is a reason to look twice, not to rejoice."""
    name, wanted = "6 student beats teacher", "no claim of more than the teacher's quality"
    claims = [c for c in seen.report.headline.claims if c.axis == "quality" and c.value] if seen.report else []
    wins = [w.rate for w in seen.report.wins if w.against == "teacher" and w.rate] if seen.report else []
    if not claims and not wins:
        return _unknown(name, wanted, "quality is not compared with the teacher's", "evaluate")
    most = max([claim.value.value for claim in claims if claim.value] + [2 * rate.value for rate in wins])
    over = [_told(claim) for claim in claims if claim.value and claim.value.value > 1]
    over += [f"wins {rate.value:.0%} of the pairs" for rate in wins if rate.value > 0.5]
    if not over:
        return _point(name, wanted, "pass", most, f"at most {most:.0%} of the teacher's")
    finding = f"suspicious: {'; '.join(over)}"
    fix = "look for held-out prompts that were trained on, for a judge with a taste, and for rules that ask too little"
    return _point(name, wanted, "warn", most, finding, fix)


def _size_ratio(seen: Evidence) -> float | None:
    """Teacher's parameters over the student's: as the checks before training counted them, else as measured."""
    check = seen.checks.get("size_ratio")
    if check is not None and check.value is not None:
        return check.value
    share = seen.report.headline.parameters_share if seen.report else None
    return 1 / share if share else None


def _adherence(seen: Evidence) -> tuple[float | None, str]:
    """The share of the teacher's answers that name what was asked for, and where it was measured."""
    rule = {_plain(label): share for label, share in _failing(seen)}
    if "adherence" in rule:
        return 1 - rule["adherence"], "the rule adherence"
    teacher = next((m for m in seen.report.models if m.key == "teacher"), None) if seen.report else None
    figure = teacher.probes.all.adherence if teacher and teacher.probes else None
    return (figure.value, "probes") if figure else (None, "")


def _failing(seen: Evidence) -> Iterable[tuple[str, float]]:
    return seen.filters.failing.items() if seen.filters else ()


def _plain(label: str) -> str:
    """A rule's name: its label without the number of one that stands twice."""
    return label.partition("#")[0]


def _figures(changes: Iterable[Difference], *, improved: bool) -> str:
    return ", ".join(change.figure.replace("_", " ") for change in changes if change.improved is improved)


def _told(claim: Claim) -> str:
    assert claim.value is not None
    low, high = claim.value.low, claim.value.high
    width = f" ({low:.2f}–{high:.2f})" if low != high else ""
    return f"{claim.name.replace('_', ' ')} {claim.value.value:.2f}{width}"


def _from_check(seen: Evidence, check: str, name: str, wanted: str) -> Check:
    """A point that the checks before training have answered."""
    found: Check | None = seen.checks.get(check)
    if found is None:
        return _unknown(name, wanted, "not checked yet", "train: its checks come first")
    if found.status == "note" and check == "chain" and found.value is None:
        return _unknown(name, wanted, found.finding, found.fix)
    return _point(name, wanted, STATUSES[found.status], found.value, found.finding, found.fix)


def _point(name: str, wanted: str, status: Status, value: float | None, finding: str, fix: str = "") -> Check:
    fix = "" if status == "pass" else fix
    return Check(name=name, wanted=wanted, status=status, value=value, finding=finding, fix=fix)


def _unknown(name: str, wanted: str, finding: str, fix: str) -> Check:
    return Check(name=name, wanted=wanted, status="unknown", finding=finding, fix=fix)


def print_checklist(checklist: Checklist, console: Console) -> None:
    """Two tables: the points, and the failures."""
    for title, points in (("checklist", checklist.points), ("common failures", checklist.failures)):
        table = Table(
            "", title, "wanted", "found", title_justify="left", pad_edge=False, box=None, padding=(0, 2, 1, 0)
        )
        for point in points:
            found = Text(point.finding)
            if point.fix:
                found.append(f"\n→ {point.fix}", style="dim")
            table.add_row(Text(point.status, style=COLOURS[point.status]), point.name, point.wanted, found)
        console.print(table)
    console.print(summary(checklist), highlight=False)


def summary(checklist: Checklist) -> str:
    """`9 pass, 2 warn, 1 fail, 2 unknown`, the empty ones left out."""
    return ", ".join(_counts(checklist))


def _counts(checklist: Checklist) -> Iterator[str]:
    for status in COLOURS:
        if count := sum(point.status == status for point in checklist.all):
            yield f"{count} {status}"


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser(
        "evaluate.report.checklist", "Holds a run, at any stage, against the checklist of a good one."
    )
    parser.add_argument("--strict", action="store_true", help="end with 1 where a point warns or is unknown too")
    recipe, run, options = parse_stage(parser, argv)
    run.check_there()
    report = read_report(run)
    found = check_run(recipe, run, report)
    print_checklist(found, Console())
    if report is not None and report.checklist != found:
        with run.locked():
            report = msgspec.structs.replace(read_report(run) or report, checklist=found)
            publish(run, report)
    stopping = ("fail", "warn", "unknown") if options.strict else ("fail",)
    bad = [point.name for point in found.all if point.status in stopping]
    if bad:
        raise DistillError(f"{run.path}: not as wanted: {', '.join(bad)}")


if __name__ == "__main__":
    run_stage(main)
