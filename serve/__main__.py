"""`python -m serve RECIPE [--model student] [--cluster ADDRESS]`: serves a model of a run, in the foreground.

On this machine, or on the nodes of a Ray cluster, until Ctrl-C. Reads the recipe and the run's student, and writes
serve-<port>.log into the run directory. Takes no lock, because `generate` works on the same run.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import UsageError
from pipeline.models import embedded_folder, resolve_model
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from pipeline.students import AFTER, BEFORE, TEACHER
from serve.command import Command, build_command, merge_args, port_number, serve_settings
from serve.named import KEYS, NAMES, address_of, reference_of, under_both_names
from serve.server import serving


def main(argv: list[str] | None = None) -> None:
    """Serves until interrupted. Raises DistillError if vLLM ends by itself."""
    recipe, run, options = parse_stage(_parser(), _joined(sys.argv[1:] if argv is None else argv))
    if options.cluster and options.print:
        raise UsageError("--print shows what this machine would start; leave out --cluster")
    if options.cluster:
        _on_cluster(recipe, run, options)
    name, host, port = address_of(recipe, options.model)
    port = options.port or port
    teacher = options.model in (TEACHER, recipe.teacher.model)
    config = _with_args(serve_settings(recipe, teacher=teacher), options.args)
    model = reference_of(recipe, run, options.model)
    if options.model in (BEFORE, AFTER):
        config = under_both_names(config, name, model)
    if options.print:
        print(command_to_show(model, name, host, port, config).shell())
        return
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    log = run.path / f"serve-{port}.log"
    console.print(f"starting vLLM for {name}; its log: {log}")
    with console.status("starting vLLM") as status:

        def waiting(seconds: float, line: str) -> None:
            status.update(f"starting vLLM, {seconds:.0f} s  [dim]{escape(line[:90])}[/dim]")

        with serving(model, port=port, host=host, config=config, log=log, served_name=name, waiting=waiting) as server:
            status.stop()
            console.print(f"ready after {server.startup_s:.0f} s: {server.base_url} serves {name}")
            console.print(f"next, in another terminal: {next_command(recipe, options, server.base_url, name)}")
            console.print("Ctrl-C ends it")
            try:
                while server.keep_up(console.print):
                    server.wait()
            except KeyboardInterrupt:
                console.print("ending vLLM")
                raise
            raise server.failure("while it was serving")


def _on_cluster(recipe: Recipe, run: RunDir, options: argparse.Namespace) -> NoReturn:
    """Serves the teacher on a cluster. Ends by KeyboardInterrupt, or raises DistillError."""
    if options.model != TEACHER:
        name = NAMES.get(options.model, options.model)
        raise UsageError(f"--cluster serves the teacher, not --model {name}; name it by --teacher.model")
    from scale.serving import Model, serve_on_cluster

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    teacher, file = recipe.teacher.model, recipe.teacher.urls_file or run.path.absolute() / "urls.txt"
    console.print(f"the URLs of its servers: {file}")
    flags = [*options.flags, *([] if recipe.teacher.urls_file else ["--teacher.urls_file", str(file)])]
    console.print(f"next, in another terminal: {_make('generate', options, flags)}\nCtrl-C ends them")
    model = Model(teacher, teacher, _with_args(recipe.serve, options.args), options.port)
    serve_on_cluster(options.cluster, model, file, console.print)
    raise KeyboardInterrupt


def command_to_show(model: str, name: str, host: str, port: int, config: ServeConfig) -> Command:
    """The command. Fetches nothing and starts nothing."""
    from serve.machine import detect
    from serve.model_facts import ModelFacts, model_facts

    folder = embedded_folder(model)
    if folder and not folder.is_dir():
        print(f"{model} is not in the cache yet; `make serve` fetches it into {folder}", file=sys.stderr)
        resolved, facts = str(folder), ModelFacts(local=True)
    else:
        resolved = resolve_model(model)
        facts = model_facts(resolved, ask_hub=False)
    return build_command(
        resolved,
        served_name=name,
        host=host,
        port=port,
        config=config,
        machine=detect(),
        facts=facts,
        environ=os.environ,
    )


def _parser() -> argparse.ArgumentParser:
    parser = stage_parser("serve", "Serve a model of the run with vLLM, until Ctrl-C.")
    parser.add_argument(
        "--port",
        type=port_number,
        help="the port to listen on (default: that of teacher.base_url; student: one more, before: two more)",
    )
    parser.add_argument(
        "--model",
        type=lambda name: KEYS.get(name, name),
        default=TEACHER,
        help="teacher (default), student (as the run trained it), before (the student before training), "
        "or any model: a Hub id, a folder, embedded:<name>",
    )
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="serve on the nodes of a Ray cluster: auto, host:port or ray://host:port"
    )
    parser.add_argument("--print", action="store_true", help="show the command and its environment, start nothing")
    parser.add_argument("--args", default="", metavar="FLAGS", help="further vLLM flags, in one string; they win")
    return parser


def _joined(argv: list[str]) -> list[str]:
    """`--args X` as `--args=X`: argparse would read an X that begins with dashes as an option of ours."""
    if "--args" not in argv[:-1]:
        return argv
    at = argv.index("--args")
    return [*argv[:at], f"--args={argv[at + 1]}", *argv[at + 2 :]]


def _with_args(config: ServeConfig, text: str) -> ServeConfig:
    try:
        further = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--args {text!r}: {error}; quote it as for a shell") from None
    return config.model_copy(update={"args": merge_args(config.args, further)})


def next_command(recipe: Recipe, options: argparse.Namespace, base_url: str, name: str) -> str:
    """The command that uses this server. It names only what differs from the recipe."""
    if options.model in (AFTER, BEFORE):
        return _make("chat", options, options.flags)
    # Make has variables of its own for these two.
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--teacher.base_url", dest="url")
    parser.add_argument("--teacher.model", dest="model")
    given, flags = parser.parse_known_args(options.flags)
    teacher = []
    if given.url or base_url != recipe.teacher.url.replace("localhost", "127.0.0.1"):
        teacher.append(f"TEACHER_URL={base_url}")
    if given.model or name != recipe.teacher.model:
        teacher.append(f"TEACHER_MODEL={name}")
    return _make("generate", options, flags, *teacher)


def _make(target: str, options: argparse.Namespace, flags: Sequence[str], *variables: str) -> str:
    """A target of Make for this recipe and run; `flags`: recipe values."""
    command = ["make", target, f"RECIPE={options.recipe}"]
    if options.run:
        command.append(f"RUN={options.run}")
    command += variables
    if flags:
        command.append(f"ARGS={shlex.join(flags)}")
    return shlex.join(command)


if __name__ == "__main__":
    run_stage(main)
