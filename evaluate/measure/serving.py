"""One vLLM server a model, for all that needs one: its speed, and its answers to the probes.

Starts the server the project serves with, measures what is not measured yet, ends it. Keeps the client's files under
evaluation/served-<model>/ in the run directory, and the server's log beside them.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from evaluate.measure.asking import answers_in, ask, asking
from evaluate.measure.results import Measurement, ProbeResult, SpeedResult
from evaluate.measure.speed import time_server
from evaluate.models import engine_folder
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.records import Prompt
from pipeline.rundir import RunDir
from serve.server import Server, free_port, serving

DYING_S = 5.0  # for a server that stops answering to end


def measure_served(
    recipe: Recipe,
    run: RunDir,
    *,
    speed: tuple[Measurement, Sequence[Prompt]] | None,
    probes: tuple[Measurement, Sequence[Prompt]] | None,
) -> None:
    """Serves the model of the measurements that are given, and saves each as soon as it is there.

    Raises DistillError if the server does not start or answers nothing.
    """
    given = speed or probes
    if given is None:
        return
    subject = given[0].subject
    folder = run.path / "evaluation" / f"served-{subject.key}"
    shutil.rmtree(folder, ignore_errors=True)  # a timing is never continued: it starts anew
    folder.mkdir(parents=True)
    model = str(engine_folder(subject, run))
    log = folder / "server.log"
    with serving(model, port=free_port(), config=recipe.serve, log=log, served_name=subject.key) as server:
        try:
            if speed:
                speed[0].save(_speed(recipe, server, folder, *speed))
            if probes:
                probes[0].save(answer_probes(asking(recipe, server), folder / "probes", *probes))
        except DistillError as error:
            if server.wait(DYING_S) is not None:
                raise server.failure(f"while the {subject.label} was measured") from error
            raise


def answer_probes(recipe: Recipe, folder: Path, measurement: Measurement, prompts: Sequence[Prompt]) -> ProbeResult:
    """Has the recipe's teacher, whichever it is, answer the probes with the recipe's own sampling."""
    started = time.monotonic()
    ask(recipe, folder, prompts)
    answers = answers_in(folder, prompts)
    if not answers:
        raise DistillError(f"{measurement.subject.label}: no probe was answered; see {folder}")
    return ProbeResult(fingerprint=measurement.fingerprint, wall_s=time.monotonic() - started, answers=answers)


def _speed(
    recipe: Recipe, server: Server, folder: Path, measurement: Measurement, prompts: Sequence[Prompt]
) -> SpeedResult:
    bursts, alone = time_server(recipe, server, folder, prompts)
    command = server.command
    return SpeedResult(
        fingerprint=measurement.fingerprint,
        device=command.device,
        dtype=command.dtype,
        bursts=bursts,
        alone=alone,
        startup_s=server.startup_s,
        peak_rss_bytes=server.peak_rss() if command.device == "cpu" else None,
    )
