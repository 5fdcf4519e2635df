"""`python -m train.publish.export RECIPE [--run DIR] [--merged | --gguf TYPE] [--dataset] [--push REPO]`: passing on.

Reads student/, kept.jsonl and lineage.json; writes folders in export/, each whole by rename, and to the Hub on request
(into a repository that it creates private, with the key in HF_TOKEN):

    export/adapter/   the LoRA adapter, or export/model/ for a student that was trained whole
    export/merged/    the adapter merged into its base: an ordinary model
    export/gguf/      one GGUF file for llama.cpp and Ollama, with a Modelfile
    export/dataset/   the rows, as `datasets.load_dataset` loads them

Each has its card and the lineage. Folders of this machine are named by their last part only; endpoints are left out.
"""

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
from pydantic import SecretStr

from pipeline.adapters import MERGED_FROM
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError, UsageError, first_line
from pipeline.instructions import with_system_of_rows
from pipeline.lineage import read_lineage
from pipeline.models import ADAPTER
from pipeline.reasoning import reasoning_form
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir, replacing_folder
from pipeline.student_config import PRUNE
from pipeline.students import after_training, check_parts, check_trained
from train.publish.cards import CARD, dataset_card, model_card, published, without_places
from train.publish.to_gguf import TYPES, check_type, write_gguf
from train.rows import read_parts, to_examples
from train.student import load_tokenizer

TOKEN_VARIABLE = "HF_TOKEN"
JSON_TEXTS = ("slots", "reference", "columns", "scores")  # columns of the data set that hold JSON as text
# Written anew, or of no use elsewhere.
NOT_PASSED_ON = {"lineage.json", "training_log.json", "training_args.bin", MERGED_FROM, CARD}
# What stays of generation_config.json. The base's sampling and penalties had no part in what was scored.
GENERATION_KEEPS = {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "transformers_version"}
# The files of an adapter or a whole model that another one's do not replace, and that would be loaded with them.
LOADED = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors|"
    r"model\.safetensors\.index\.json|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"merges\.txt|tokenizer\.model|chat_template\.jinja"
)
# What an export writes, besides other files of the student's folder.
WRITTEN = re.compile(
    rf"{LOADED.pattern}|lineage\.json|{re.escape(CARD)}|Modelfile|.+-({'|'.join(TYPES)})\.gguf|"
    r"data(/(train|validation|test)\.jsonl)?"
)


def main() -> None:
    about = "Writes the student with its card into export/; pushes it on request."
    parser = stage_parser("train.publish.export", about)
    parser.add_argument("--merged", action="store_true", help="the adapter merged into its base, not the adapter")
    parser.add_argument("--gguf", metavar="TYPE", help=f"one file for llama.cpp and Ollama: {', '.join(TYPES)}")
    parser.add_argument("--dataset", action="store_true", help="the data set too")
    parser.add_argument("--push", metavar="OWNER/NAME", help="to this repository of the Hub; HF_TOKEN is the key")
    parser.add_argument("--public", action="store_true", help="a repository that --push creates is public, not private")
    recipe, run, options = parse_stage(parser)
    if options.public and not options.push:
        raise UsageError("--public is for --push OWNER/NAME")
    if options.gguf:
        check_type(options.gguf)
    token = token_for(options.push) if options.push is not None else None  # before anything is written
    with run.locked():
        data = options.push if options.dataset else None
        if options.gguf:
            folders = {"model": export_gguf(recipe, run, options.gguf, repo=options.push, data=data)}
        else:
            folders = {"model": export_model(recipe, run, merged=options.merged, repo=options.push, data=data)}
        if options.dataset:
            folders["dataset"] = export_dataset(recipe, run, data)
        for kind, exported in folders.items():
            print(f"{kind}: {exported}")
            if token is not None:  # within the lock: files are read until the end, and an export replaces them
                print(f"{kind}: {push(exported, options.push, kind=kind, token=token, public=options.public)}")


def export_model(
    recipe: Recipe, run: RunDir, *, merged: bool = False, repo: str | None = None, data: str | None = None
) -> Path:
    """Writes export/adapter, export/merged or export/model, and returns the folder.

    `repo` and `data`: the Hub repositories of the model and of its data set, for the card. Raises UsageError if there
    is no student of the recipe, or it is an adapter whose base, or the base's chat template, nobody else has.
    """
    lineage = _student_lineage(recipe, run)
    student: str = lineage["train"]["student"]
    adapter = (run.student / ADAPTER).is_file()
    name = "merged" if merged and adapter else "adapter" if adapter else "model"
    if name == "adapter" and student.startswith(PRUNE):
        raise UsageError(f"{run.student}: an adapter over a pruned base, which nobody else has; export with --merged")
    if name == "adapter" and (lineage["train"].get("built") or {}).get("chat_template"):
        raise UsageError(
            f"{run.student}: an adapter with student.chat_template, in place of which servers take the base's; "
            "export with --merged"
        )
    folder = run.path / "export" / name
    with _replacing_export(folder, run) as building:
        source = after_training(recipe, run) if name == "merged" else run.student
        shutil.copytree(source, building, dirs_exist_ok=True, ignore=lambda _, names: NOT_PASSED_ON & {*names})
        if name == "adapter":
            config = json.loads((building / ADAPTER).read_bytes())
            config["base_model_name_or_path"] = published(lineage["train"]["initialised_from"])
            (building / ADAPTER).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _drop_sampling(building / "generation_config.json")
        card = model_card(recipe, lineage, repo=repo or name, adapter=name == "adapter", data=data)
        _write(building, card, lineage, recipe)
    return folder


def export_gguf(recipe: Recipe, run: RunDir, kind: str, *, repo: str | None = None, data: str | None = None) -> Path:
    """Writes export/gguf: the whole student as one file of a type (train.publish.to_gguf.TYPES), and its Modelfile.

    Returns the folder. Raises UsageError if there is no student, DistillError if it cannot be converted.
    """
    lineage = _student_lineage(recipe, run)
    folder = run.path / "export" / "gguf"
    with _replacing_export(folder, run) as building:
        asked = with_system_of_rows(recipe, lineage["train"])
        file = write_gguf(asked, after_training(recipe, run), building, name=lineage["name"], kind=kind)
        card = model_card(recipe, lineage, repo=repo or "gguf", adapter=False, gguf=file, data=data)
        _write(building, card, lineage, recipe)
    return folder


def export_dataset(recipe: Recipe, run: RunDir, repo: str | None = None) -> Path:
    """Writes export/dataset, the kept rows in the three parts that training uses, and returns the folder.

    Raises DataError if there are none, or one is faulty; UsageError if the student was trained on other parts.
    """
    check_parts(recipe, run.student, "the test rows of this data set")
    parts = read_parts(recipe, run)
    rows_of = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    sections = {name: section for name, section in read_lineage(run).items() if name in ("generate", "filters")}
    lineage = {"name": run.name, **sections}
    folder = run.path / "export" / "dataset"
    with _replacing_export(folder, run) as building:
        (building / "data").mkdir()
        columns: list[str] = []  # to declare in the card, once a tool is called
        for part, rows in rows_of.items():
            with (building / "data" / f"{part}.jsonl").open("wb") as file:
                for row in _dataset_rows(rows, recipe, run):
                    file.write(msgspec.json.encode(row) + b"\n")
                    if any(turn.get("tool_calls") for turn in (*row["prompt"], *row["completion"])):
                        columns = [*row]
        counts = {part: len(rows) for part, rows in rows_of.items()}
        card = dataset_card(recipe, lineage, counts, repo=repo or "dataset", columns=columns)
        _write(building, card, lineage, recipe)
    return folder


def _replacing_export(folder: Path, run: RunDir) -> AbstractContextManager[Path]:
    """As `replacing_folder`. Raises UsageError if there is something in the old folder that no export wrote."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not WRITTEN.fullmatch(name) and not (run.student / name).exists():
            raise UsageError(f"{path}: no export wrote it, and this one replaces the folder; move it elsewhere")
    return replacing_folder(folder)


def _dataset_rows(rows: Sequence[Kept], recipe: Recipe, run: RunDir) -> Iterator[dict[str, Any]]:
    """What training takes, and more: the same columns for every recipe, so that any reader finds one schema."""
    keep = recipe.train.reasoning == "keep"
    form = reasoning_form(recipe.train, load_tokenizer(str(run.student))) if keep else None
    for row, example in zip(rows, to_examples(rows, recipe.student, form), strict=True):
        yield {
            "id": row.id,
            "prompt_id": row.prompt_id,
            **example,
            "finish_reason": row.finish_reason,
            "model": published(row.model),
            "created": row.created,
            **{name: msgspec.json.encode(getattr(row, name)).decode() for name in JSON_TEXTS},
        }


def _student_lineage(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """The lineage that the student was saved with, with its scores if this very student was evaluated since.

    Raises UsageError if there is no student, its tokenizer cannot be loaded, it has no lineage, or another recipe
    trained it: the card would tell of that recipe.
    """
    check_trained(recipe, run)
    lineage = read_lineage(RunDir(run.student))
    if "train" not in lineage:
        raise UsageError(f"{run.student}: its lineage.json is gone, which a card is made of; train again")
    load_tokenizer(str(run.student))  # a folder without one is of no use
    lineage.pop("evaluate", None)  # of a student before it
    now = read_lineage(run)
    if "evaluate" in now and now.get("train", {}).get("fingerprint") == lineage["train"]["fingerprint"]:
        lineage["evaluate"] = now["evaluate"]
    return lineage


def _drop_sampling(path: Path) -> None:
    """Leaves in a generation_config.json, if there is one, what does not change which tokens are chosen."""
    if path.is_file():
        kept = {name: value for name, value in json.loads(path.read_bytes()).items() if name in GENERATION_KEEPS}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write(folder: Path, card: str, lineage: dict[str, Any], recipe: Recipe) -> None:
    text = json.dumps(without_places(lineage, recipe), indent=2, ensure_ascii=False) + "\n"
    (folder / "lineage.json").write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


def token_for(repo: str) -> SecretStr:
    """The key to push with. Raises UsageError if it is not set, or `repo` is no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not repo:
        raise UsageError("--push: no repository; give one, as in make push REPO=owner/name")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: {first_line(error)}") from None
    if repo.count("/") != 1:
        raise UsageError(f"--push {repo}: give owner and name, as in me/{repo}")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise UsageError(f"--push needs {TOKEN_VARIABLE}: a key of the Hub that may write to {repo}")
    return SecretStr(token)


def push(folder: Path, repo: str, *, kind: str, token: SecretStr, public: bool = False) -> str:
    """Uploads a folder's files to a model or dataset repository, in place of another export's; returns its address.

    Raises UsageError if the Hub refuses, DistillError if it fails or cannot be reached.
    """
    import httpx2  # what huggingface_hub speaks HTTP with, whose errors it lets through
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token.get_secret_value(), library_name="distillate")
    try:
        made = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        message = f"{folder.name} of a distillation"
        stale = _of_other_models(folder, api.list_repo_files(repo)) if kind == "model" else None
        api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message, delete_patterns=stale
        )
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, first_line(error.server_message or error)
        if status >= 500:
            failed = f"--push {repo}: the Hub failed ({status}: {reason})"
            raise DistillError(f"{failed}; try again later, {folder} is whole") from None
        hint = f"; may the key in {TOKEN_VARIABLE} write there?" if status in (401, 403) else ""
        raise UsageError(f"--push {repo}: the Hub refused ({status}: {reason}){hint}") from None
    except (httpx2.HTTPError, OSError) as error:
        reason = first_line(error)
        raise DistillError(f"--push {repo}: the Hub cannot be reached ({reason}); {folder} is whole") from None
    return str(made)


def _of_other_models(folder: Path, there: Sequence[str]) -> list[str]:
    """The files in a repository that an earlier export left and that would be loaded with `folder`'s, as glob patterns.

    GGUF files stand beside any others. A repository without a lineage has no export of ours.
    """
    if "lineage.json" not in there or any(folder.glob("*.gguf")):
        return []
    return [glob.escape(file) for file in there if LOADED.fullmatch(file) and not (folder / file).exists()]


if __name__ == "__main__":
    run_stage(main)
