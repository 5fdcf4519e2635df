"""The end of the chain: what the student gained in a few lines, and how to talk to it.

Reads the report, and writes nothing.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluate.document import MEASURES, Report, Scope, read_report
from evaluate.figures.promise import ratio_format
from evaluate.report.tables import VERDICTS
from pipeline.rundir import RunDir
from pipeline.students import AFTER, TEACHER

WON: dict[str, tuple[str, str, Scope, tuple[str, ...]]] = {  # claim: what is won, in which words, by which figure
    "quality_accuracy": ("accuracy", "of the teacher's", "verified", ("accuracy",)),
    "quality_bits": ("quality", "of the teacher's", "test", ("bits_per_character",)),
    "quality_probes": ("quality", "of the teacher's", "all", ("passing",)),
    "size": ("size", "smaller", "engine", ("parameters",)),
    "speed": ("speed", "as fast", "engine", ("answers_per_s", "tokens_per_s")),
}


def last_words(path: Path, run: RunDir, flags: Sequence[str] = ()) -> list[str]:
    """The lines; none of them if there is no report. `flags`: the recipe values that the chain was given."""
    report = read_report(run)
    return [] if report is None else [*_won(report), *_talk(path, run, flags)]


def _won(report: Report) -> Iterator[str]:
    models = {model.key: model for model in report.models}
    for claim in report.headline.claims:
        if claim.value is None or claim.name not in WON:
            continue
        what, how, part, names = WON[claim.name]
        name = next((name for name in names if models[AFTER].figure(part, name)), names[-1])
        ours, theirs = models[AFTER].figure(part, name), models[TEACHER].figure(part, name)
        figures = ""
        if ours and theirs:
            show = MEASURES[name].show
            figures = f": {MEASURES[name].name} {show(ours.value)}, the teacher's {show(theirs.value)}"
        yield f"{what:<9} {ratio_format(claim)(claim.value.value)} {how}{figures}"
    yield f"{VERDICTS[report.headline.holds][0]} (90% of the quality, 3 times smaller and faster)"


def _talk(path: Path, run: RunDir, flags: Sequence[str]) -> Iterator[str]:
    here, cwd = Path(sys.executable), Path.cwd()
    python = str(here.relative_to(cwd) if here.is_relative_to(cwd) else here)
    yield "Talk to the student, beside its teacher on a page of this machine or alone in the terminal:"
    for options in ([], ["--terminal"]):
        yield f"  {shlex.join([python, '-m', 'chat', str(path), '--run', str(run.path), *flags, *options])}"
