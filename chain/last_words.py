"""The end of the chain: what was won in three lines, and how to talk to the student.

Reads the report and the test rows, and writes nothing.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from evaluate.document import MEASURES, Part, Report, read_report
from evaluate.figures.promise import shown
from evaluate.models import AFTER, TEACHER
from evaluate.report.tables import VERDICTS
from pipeline.adapters import ADAPTER
from pipeline.chat import asked_of_student
from pipeline.recipe import Recipe
from pipeline.records import Kept, read_jsonl
from pipeline.rundir import RunDir
from pipeline.students import merged_folder

PORT = 8001  # the teacher's is 8000
WON: dict[str, tuple[str, str, Part, tuple[str, ...]]] = {  # claim: what is won, in which words, by which figure
    "quality_accuracy": ("accuracy", "of the teacher's", "verified", ("accuracy",)),
    "quality_bits": ("quality", "of the teacher's", "test", ("bits_per_character",)),
    "quality_probes": ("quality", "of the teacher's", "all", ("passing",)),
    "size": ("size", "smaller", "engine", ("parameters",)),
    "speed": ("speed", "as fast", "engine", ("answers_per_s", "tokens_per_s")),
}


def last_words(recipe: Recipe, path: Path, run: RunDir) -> list[str]:
    """The lines; none of them if there is no report."""
    report = read_report(run)
    return [] if report is None else [*_won(report), *_talk(recipe, path, run)]


def _won(report: Report) -> Iterator[str]:
    after, teacher = ({model.key: model for model in report.models}[key] for key in (AFTER, TEACHER))
    for claim in report.headline.claims:
        if claim.value is None or claim.name not in WON:
            continue
        what, how, part, names = WON[claim.name]
        name = next((name for name in names if after.figure(part, name)), names[-1])
        ours, theirs = after.figure(part, name), teacher.figure(part, name)
        figures = ""
        if ours and theirs:
            show = MEASURES[name].show
            figures = f": {MEASURES[name].name} {show(ours.value)}, the teacher's {show(theirs.value)}"
        yield f"{what:<9} {shown(claim)(claim.value.value)} {how}{figures}"
    yield f"{VERDICTS[report.headline.holds][0]} (90% of the quality, 3 times smaller and faster)"


def _talk(recipe: Recipe, path: Path, run: RunDir) -> Iterator[str]:
    is_adapter = (run.student / ADAPTER).is_file()  # vLLM is given whole models
    model = str(merged_folder(run, AFTER) if is_adapter else run.student)
    messages = asked_of_student(next(read_jsonl(run.test, Kept)).messages, recipe.student)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    body = {"model": model, "temperature": 0, "max_tokens": recipe.sampling.max_tokens, "messages": turns}
    here, cwd = Path(sys.executable), Path.cwd()
    python = str(here.relative_to(cwd) if here.is_relative_to(cwd) else here)
    url, data = f"http://127.0.0.1:{PORT}/v1/chat/completions", json.dumps(body, ensure_ascii=False)
    yield "Talk to the student: serve it, and ask it from another terminal:"
    yield f"  {shlex.join([python, '-m', 'serve', str(path), '--model', model, '--port', str(PORT)])}"
    yield f"  {shlex.join(['curl', url, '-H', 'Content-Type: application/json', '-d', data])}"
