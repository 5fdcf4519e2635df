"""Stages as processes of their own, each the very command that a user would type, and the teacher they may need."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.address import is_loopback, is_port_open
from pipeline.child import run_child, shell_code
from pipeline.errors import DistillError, RequestsFailed
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import TEACHER
from serve.named import address_of
from serve.server import serving

REQUESTS_FAILED = RequestsFailed.exit_code


class StageFailed(DistillError):
    """A stage failed, and has said why if it could; the chain ends with its code."""

    def __init__(self, name: str, code: int) -> None:
        how = f"ended with {code}; fix it" if code > 0 else f"was ended by {signal.Signals(-code).name}; see why"
        super().__init__(f"`python -m {name}` {how}, and run the same command again")
        self.exit_code = shell_code(code)


@contextmanager
def teacher(recipe: Recipe, run: RunDir) -> Iterator[Callable[[], object] | None]:
    """The recipe's endpoint, up: others' servers, or what listens there already, else the teacher is served here.

    Yields what keeps a server of ours up, for stages to call now and then; None if there is none. Raises DistillError
    with the server's last words if a stage failed and the server has ended.
    """
    url = recipe.teacher.url
    if recipe.teacher.urls_file or not is_loopback(url):
        yield None
        return
    if is_port_open(url):
        print(f"using what answers at {url}; if it ends before this does, run the same command again", flush=True)
        yield None
        return
    _, host, port = address_of(recipe, TEACHER)
    run.path.mkdir(parents=True, exist_ok=True)
    log = run.path / "teacher.log"
    print(f"serving {recipe.teacher.model} (about a minute; log: {log})", flush=True)
    with serving(recipe.teacher.model, host=host, port=port, config=recipe.serve, log=log) as server:
        print(f"ready at {server.base_url} after {server.startup_s:.0f} s", flush=True)
        try:
            yield lambda: server.keep_up(partial(print, flush=True))
        except StageFailed as failed:
            if server.wait(0) is not None:
                raise server.failure("while it was asked") from failed
            raise


def judges(recipe: Recipe) -> bool:
    """Whether the filters ask the teacher's server for verdicts."""
    judge = recipe.filters.judge
    return judge is not None and recipe.teacher.another(judge, "filters.judge").url == recipe.teacher.url


def teaches(recipe: Recipe) -> bool:
    """Whether the training asks the teacher's server about answers."""
    return recipe.train.soft and recipe.train.kd.teacher == "served"


def stage(
    name: str, run: RunDir, recipe: Path, flags: Sequence[str], keep_up: Callable[[], object] | None = None
) -> int:
    """Runs one stage to its end, with its server kept up. Returns 0, or 4 where some requests failed for good.

    Raises StageFailed if it failed, KeyboardInterrupt if it was interrupted.
    """
    code = run_child([sys.executable, "-m", name, str(recipe), "--run", str(run.path), *flags], meanwhile=keep_up)
    if code not in (0, REQUESTS_FAILED):
        raise StageFailed(name, code)
    return code
