"""The models that are asked, and the servers that they need: one that runs already is used, another is started."""

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from generate.dialect import Dialect
from generate.targets import urls_now
from pipeline.adapters import stamp_files
from pipeline.address import is_loopback, is_port_open
from pipeline.errors import DistillError, UsageError
from pipeline.instructions import asked_of_student, told_in_words
from pipeline.recipe import Recipe
from pipeline.records import Message
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from pipeline.students import AFTER, BEFORE, TEACHER, check_trained
from pipeline.teacher_config import TeacherConfig
from serve.command import choose_device, merge_args, serve_settings
from serve.machine import detect
from serve.named import NAMES, address_of, name_of_files, reference_of
from serve.server import Server, free_port, served_models, serving, url_of

LABELS = {TEACHER: "teacher", BEFORE: "student before", AFTER: "student after"}  # in the order of the columns
CACHE_GIB = 1.0  # KV cache of a server on a CPU: for one conversation, so that three servers fit
GPU_SHARE = 0.9  # of a GPU's memory, for all servers together: vLLM's own


@dataclass
class Model:
    """One model that is asked. Its address becomes known when its server is ready."""

    key: str
    label: str
    recipe: Recipe  # with this model in the teacher's place
    state: Literal["starting", "ready", "failed"] = "starting"
    said: str = "waits for its server"  # while it is not ready
    server: Server | None = None  # if it was started here
    dialect: Dialect = field(default_factory=Dialect)
    folder: Path | None = None  # of the student after training: where the run has it
    stamps: list[str] = field(init=False)  # of its files, when the chat began

    def __post_init__(self) -> None:
        self.stamps = stamp_files(self.folder) if self.folder else []

    @property
    def replaced(self) -> bool:
        """Whether the run has another student than the one that is asked: it was trained again meanwhile."""
        return self.folder is not None and stamp_files(self.folder) != self.stamps

    @property
    def name(self) -> str:
        """As users name it, and as its own server does."""
        return NAMES[self.key]

    def asked(self, conversation: Sequence[Message]) -> list[Message]:
        """The conversation as this model is asked; what only the teacher is told is in its recipe."""
        return list(conversation) if self.key == TEACHER else asked_of_student(conversation, self.recipe.student)

    @property
    def told(self) -> str:
        """How it is asked, in words."""
        if self.key == TEACHER:
            told = told_in_words(self.recipe.teacher)
        else:
            own = self.recipe.student.system if self.recipe.student else None
            told = {None: "", "": "no system prompt"}.get(own, "its own system prompt")
        return f"told {told or 'nothing more than the prompt'}"

    def at(self, base_url: str) -> None:
        """Marks the model as ready: it answers there, under its own name."""
        served = TeacherConfig(model=self.name, base_url=base_url, api_key_env="VLLM_API_KEY")
        if self.key == TEACHER:
            served = self.recipe.teacher.only_at({base_url: 1.0})
        self.recipe = self.recipe.model_copy(update={"teacher": served})
        self.state, self.said = "ready", ""


def choose_models(recipe: Recipe, run: RunDir, keys: Sequence[str]) -> list[Model]:
    """The models of these keys. Those whose server runs already are ready.

    Raises UsageError if a student is asked for that is not trained yet, RecipeError if `teacher.urls_file` has no URLs.
    """
    if AFTER in keys:
        check_trained(recipe, run)
    models = [
        Model(key, LABELS[key], recipe, folder=run.student if key == AFTER else None) for key in LABELS if key in keys
    ]
    for model in models:
        if model.key == TEACHER:
            found = next((url for url in urls_now(recipe.teacher) if not is_loopback(url) or is_port_open(url)), None)
        else:
            _, host, port = address_of(recipe, model.key)
            url = url_of(host, port)
            found = url if is_port_open(url) and _serves(url, model, run) else None
        if found:
            model.at(found)
    return models


def _serves(url: str, model: Model, run: RunDir) -> bool:
    """Whether the server at the URL has loaded this very model, as its second name says.

    Tells of another student, and of a key that is refused.
    """
    try:
        served = served_models(url)
    except UsageError as error:
        print(f"warning: {error}; another one is started now", file=sys.stderr)
        return False
    if model.name not in served:
        return False
    folder = reference_of(model.recipe, run, model.key)
    found = name_of_files(model.name, folder) in served
    if not found:
        why = f"its {model.name!r} is not {folder} as it is now, so another server is started"
        print(f"warning: {url}: {why}; end the old one to free its memory", file=sys.stderr)
    return found


@contextmanager
def starting(models: Sequence[Model], run: RunDir) -> Iterator[None]:
    """Starts the servers that are missing while the block runs, one after the other, the student's first.

    The block begins at once; a model's `state` says how far it is. All servers end with the block.
    """
    stopping = threading.Event()
    missing = [model for model in models if model.state == "starting"]

    def work() -> None:
        with ExitStack() as servers:
            for model in reversed(missing):
                _start(model, run, len(missing), servers, stopping)
            stopping.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _start(model: Model, run: RunDir, count: int, servers: ExitStack, stopping: threading.Event) -> None:
    """Starts one of `count` servers. Raises nothing: an error becomes the model's state."""

    def waiting(seconds: float, line: str) -> None:
        model.said = f"starting vLLM, {seconds:.0f} s"
        if stopping.is_set():
            raise DistillError("stopped")

    if stopping.is_set():
        return
    recipe = model.recipe
    served_name = recipe.teacher.model if model.key == TEACHER else model.name
    log = run.path / f"chat-{model.name}.log" if os.access(run.path, os.W_OK) else None  # of a run that is only read
    try:
        model.said = "preparing its weights"
        reference = reference_of(recipe, run, model.key)
        config = beside_others(serve_settings(recipe, teacher=model.key == TEACHER), count)
        server = serving(reference, port=free_port(), config=config, log=log, served_name=served_name, waiting=waiting)
        model.server = servers.enter_context(server)
        model.at(model.server.base_url)
    except Exception as error:  # the thread's end: whatever it is, the page must say it
        model.state, model.said = "failed", str(error)


def beside_others(config: ServeConfig, count: int) -> ServeConfig:
    """The settings with which `count` servers fit on this machine, for one conversation each. The recipe's own win."""
    if choose_device(config, detect()) == "cpu":
        return config.model_copy(update={"kv_cache_gib": config.kv_cache_gib or CACHE_GIB})
    share = ["--gpu-memory-utilization", f"{GPU_SHARE / count:.2f}"]
    return config.model_copy(update={"args": merge_args(share, config.args)})
