"""An evaluation of a tiny run: what is measured, kept, measured again, refused. No server: speed is saved by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import evaluate.measure.perplexity
from evaluate.__main__ import main
from evaluate.document import Estimate, Report, exactly
from evaluate.figures.quality import perplexity_figures
from evaluate.measure.perplexity import score_rows
from evaluate.measure.results import FOLDER, Burst, Entry, Lone, PerplexityResult, RowScore, SpeedResult, read_test
from evaluate.models import digest_subject, engine_folder, load, subjects
from evaluate.run import evaluate_run, make_plan
from pipeline.adapters import measure_weights
from pipeline.errors import DataError, DistillError, UsageError
from pipeline.lineage import record_lineage
from pipeline.recipe import Recipe
from pipeline.records import encode_line
from pipeline.rundir import RunDir
from pipeline.students import AFTER, BEFORE, TEACHER
from tests.tiny_student import CHATML, make_recipe, story_rows, tiny_model

ROWS = 6
PATH = Path("recipe.yaml")  # where functions of a recipe's rules would be looked for


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose student is trained: teacher and student are tiny, the training only shifted some weights."""
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    made.test.write_bytes(b"".join(encode_line(row) for row in story_rows(ROWS)))
    tiny_model(tmp_path / "teacher", layers=3)
    tiny_model(tmp_path / "base")
    shutil.copytree(tmp_path / "base", made.student)
    shift_weights(made.student)
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(str(tmp_path / "base"), teacher=str(tmp_path / "teacher"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that an evaluation loads, in order."""
    labels: list[str] = []

    def counting(subject: Any, **options: Any) -> Any:
        labels.append(subject.key)
        return load(subject, **options)

    monkeypatch.setattr(evaluate.measure.perplexity, "load", counting)
    return labels


def perplexity_of(scores: list[RowScore]) -> float:
    return perplexity_figures({"model": scores})["model"]["perplexity"].value


def perplexity_in(report: Report, key: str) -> Estimate | None:
    return next(model for model in report.models if model.key == key).figure("test", "perplexity")


def shift_weights(folder: Path, by: float = 0.02) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += by
    model.save_pretrained(folder)


def save_speeds(recipe: Recipe, run: RunDir) -> None:
    """What two servers would have given: the teacher 100 tokens in 10 s, the student 120 in 4 s."""
    for subject, tokens, wall_s in zip(subjects(recipe, run), (100, None, 120), (10.0, None, 4.0), strict=True):
        if tokens and wall_s:
            speed_of(subject, recipe, run).write(speed_result(tokens, wall_s))


def speed_of(subject: Any, recipe: Recipe, run: RunDir) -> Entry:
    plan = make_plan(recipe, run, PATH)
    return plan.entry("speed", subject, plan.timing)


def speed_result(tokens: int, wall_s: float) -> SpeedResult:
    """Three timings, the middle one of `wall_s`; three lone requests, 10 tokens in 1 s, the first after 0.1 to 0.3."""
    return SpeedResult(
        device="cpu",
        dtype="float32",
        bursts=[Burst(11, 1, tokens, wall_s * factor) for factor in (1, 0.8, 1.25)],
        alone=[Lone(first, 1.0, 10) for first in (0.1, 0.3, 0.2)],
        peak_rss_bytes=3 << 30,
    )


def test_models_are_scored_without_attention_that_plans_for_each_length(run: RunDir, recipe: Recipe) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load(subjects(recipe, run)[1], dtype="float32", device="cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_every_model_is_scored_and_the_report_written(run: RunDir, recipe: Recipe, loaded: list[str]) -> None:
    save_speeds(recipe, run)
    report = evaluate_run(recipe, run, PATH, speed=False)
    assert loaded == ["teacher", "student_before", "student_after"]
    teacher, before, after = report.models
    scored, untrained = perplexity_in(report, AFTER), perplexity_in(report, BEFORE)
    assert scored and untrained and perplexity_in(report, TEACHER)
    rows = read_test(run)
    model, tokenizer = load(subjects(recipe, run)[2], dtype="float32", device="cpu")
    expected = perplexity_of(score_rows(model, tokenizer, rows))
    assert scored.value == pytest.approx(expected, rel=0.02)  # it may be scored in bfloat16
    assert scored.low <= scored.value <= scored.high
    assert scored.value != untrained.value
    assert (report.rows.test, report.rows.scored, report.rows.prompts) == (ROWS, ROWS, ROWS)
    assert teacher.figures["engine"]["tokens_per_s"].value == 10 and "tokens_per_s" not in before.figures["engine"]
    engine = after.figures["engine"]
    assert engine["completion_tokens"] == exactly(12)  # over those that were answered
    assert engine["peak_rss_mib"] == exactly(3072)
    assert engine["tokens_per_s"] == Estimate(30, 24, 37.5) and "3.0 times as fast" in report.headline.text
    assert engine["tokens_per_s_alone"].value == 10
    assert engine["first_token_s"].value == 0.2
    assert report.samples == [] and report.probes is None and "Probes were not answered." in report.notes
    assert json.loads(run.report.read_bytes())["models"][2]["figures"]["engine"]["tokens_per_s"]["value"] == 30
    assert "3.0 times as fast" in run.report_html.read_text(encoding="utf-8")
    lineage = json.loads(run.lineage.read_bytes())["evaluate"]
    assert lineage["perplexity"]["student_after"] == scored.value and lineage["rows"] == ROWS


def test_nothing_changed_so_nothing_is_measured(
    run: RunDir, recipe: Recipe, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate_run(recipe, run, PATH, speed=False)
    loaded.clear()
    assert evaluate_run(recipe, run, PATH, speed=False) == first
    assert loaded == [] and "the report is up to date" in capsys.readouterr().err
    recorded = run.lineage.read_bytes()
    run.lineage.write_text(json.dumps({"name": "run"}))  # as if it had been killed right after it wrote the report
    assert evaluate_run(recipe, run, PATH, speed=False) == first and run.lineage.read_bytes() == recorded
    evaluate_run(recipe, run, PATH, speed=False, force=True)
    assert loaded == ["teacher", "student_before", "student_after"]


def test_a_stopped_evaluation_goes_on_where_it_was(
    run: RunDir, recipe: Recipe, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = evaluate.measure.perplexity.load

    def stopped(subject: Any, **options: Any) -> Any:
        if subject.key == "student_before":
            raise KeyboardInterrupt
        return counting(subject, **options)

    monkeypatch.setattr(evaluate.measure.perplexity, "load", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(recipe, run, PATH, speed=False)
    assert not run.report.exists()
    monkeypatch.setattr(evaluate.measure.perplexity, "load", counting)
    evaluate_run(recipe, run, PATH, speed=False)
    assert loaded == ["teacher", "student_before", "student_after"]


def test_a_new_student_is_scored_anew_and_the_others_are_not(run: RunDir, recipe: Recipe, loaded: list[str]) -> None:
    save_speeds(recipe, run)
    first = evaluate_run(recipe, run, PATH, speed=False)
    loaded.clear()
    shift_weights(run.student)  # the same names and sizes, other values
    second = evaluate_run(recipe, run, PATH, speed=False)
    assert loaded == ["student_after"]
    assert perplexity_in(second, AFTER) != perplexity_in(first, AFTER)
    assert second.models[2].figure("engine", "tokens_per_s") is None  # the old student's speed is not this one's
    assert second.models[0].figures["engine"]["tokens_per_s"].value == 10


def test_what_is_measured_of_weights_that_changed_meanwhile_is_not_kept_as_that_of_the_old_ones(
    run: RunDir, recipe: Recipe, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = evaluate.measure.perplexity.load

    def trained_first(subject: Any, **options: Any) -> Any:
        if subject.key == AFTER:
            shift_weights(run.student)
        return counting(subject, **options)

    monkeypatch.setattr(evaluate.measure.perplexity, "load", trained_first)
    with pytest.raises(DistillError, match=r"^student after: .*student changed while it was measured; run the same"):
        evaluate_run(recipe, run, PATH, speed=False)
    assert not (run.path / FOLDER / f"perplexity-{AFTER}.json").exists()
    monkeypatch.setattr(evaluate.measure.perplexity, "load", counting)
    evaluate_run(recipe, run, PATH, speed=False)
    assert loaded == ["teacher", "student_before", "student_after", "student_after"]


def test_a_local_teacher_and_base_with_other_weights_are_scored_anew(
    run: RunDir, recipe: Recipe, loaded: list[str]
) -> None:
    first = evaluate_run(recipe, run, PATH, speed=False)
    for model, key in ((recipe.teacher.model, TEACHER), (recipe.student and recipe.student.model, BEFORE)):
        loaded.clear()
        shift_weights(Path(str(model)))  # the same names and sizes, other values
        second = evaluate_run(recipe, run, PATH, speed=False)
        assert loaded == [key] and perplexity_in(second, key) != perplexity_in(first, key)


def test_timings_of_different_machines_are_not_compared(run: RunDir, recipe: Recipe) -> None:
    """The student was trained again, and timed on a machine with a GPU; the teacher's timing is older."""
    save_speeds(recipe, run)
    after, timed = subjects(recipe, run)[2], speed_result(120, 4.0)
    elsewhere = [msgspec.structs.replace(burst, machine="A CPU, 8 cores, A GPU") for burst in timed.bursts]
    speed_of(after, recipe, run).write(msgspec.structs.replace(timed, bursts=elsewhere))
    report = evaluate_run(recipe, run, PATH, report_only=True)
    (claim,) = (claim for claim in report.headline.claims if claim.axis == "speed")
    assert claim.value is None and claim.verdict == "not measured" and "times as fast" not in report.headline.text
    assert any("different machines (one that is not recorded; A CPU, 8 cores, A GPU)" in note for note in report.notes)


def test_models_with_other_tokens_are_told_apart_by_how_much_a_token_holds(run: RunDir, recipe: Recipe) -> None:
    """The teacher's cached scores are made those of a tokenizer that needs twice as many tokens."""
    assert not any("tokenizers differ" in note for note in evaluate_run(recipe, run, PATH, speed=False).notes)
    path = run.path / FOLDER / f"perplexity-{TEACHER}.json"
    found = msgspec.json.decode(path.read_bytes(), type=PerplexityResult)
    length = sum(score.characters for score in found.scores) / sum(score.tokens for score in found.scores)
    twice = [msgspec.structs.replace(score, tokens=2 * score.tokens) for score in found.scores]
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(found, scores=twice)))
    (note,) = (note for note in evaluate_run(recipe, run, PATH, report_only=True).notes if "tokenizers differ" in note)
    assert f"teacher {length / 2:.2f}, " in note and note.endswith(f"student after {length:.2f}.")


@pytest.mark.parametrize(
    ("timings", "verdict", "why"),
    [(1, "not shown", "timed once"), (2, "not shown", "timed twice"), (3, "yes", "")],
)
def test_few_timings_show_no_speed(timings: int, verdict: str, why: str, run: RunDir, recipe: Recipe) -> None:
    """Of two models that are as fast, both timings of one are above both of the other's in one of six evaluations."""
    save_speeds(recipe, run)
    for number, tokens in ((0, 100), (2, 600)):
        timed = speed_result(tokens, 10.0)
        fewer = msgspec.structs.replace(timed, bursts=timed.bursts[: timings if number else 3])
        speed_of(subjects(recipe, run)[number], recipe, run).write(fewer)
    report = evaluate_run(recipe, run, PATH, report_only=True)
    (claim,) = (claim for claim in report.headline.claims if claim.axis == "speed")
    assert (claim.verdict, claim.why) == (verdict, why)


def test_rows_are_scored_again_for_a_student_that_learns_reasoning_and_no_model_is_asked_again(
    run: RunDir, recipe: Recipe
) -> None:
    plan = make_plan(recipe, run, PATH)
    train = recipe.train.model_copy(update={"reasoning": "keep"})
    kept = replace(plan, recipe=recipe.model_copy(update={"train": train}))
    for name, inputs, same in (("perplexity", plan.rows, False), ("probes", plan.timing, True)):
        assert (plan.entry(name, plan.models[2], inputs) == kept.entry(name, plan.models[2], inputs)) is same


def test_what_is_measured_again_is_reported_again(run: RunDir, recipe: Recipe) -> None:
    save_speeds(recipe, run)
    evaluate_run(recipe, run, PATH, speed=False)
    speed_of(subjects(recipe, run)[2], recipe, run).write(speed_result(120, 8.0))  # of the same things, another time
    found = evaluate_run(recipe, run, PATH, speed=False).models[2].figure("engine", "tokens_per_s")
    assert found and found.value == 15


def test_other_rows_are_scored_anew(run: RunDir, recipe: Recipe, loaded: list[str]) -> None:
    evaluate_run(recipe, run, PATH, speed=False)
    loaded.clear()
    fewer = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"max_rows": 3})})
    assert evaluate_run(fewer, run, PATH, speed=False).rows.scored == 3
    assert len(loaded) == 3


def test_a_report_says_with_what_it_was_made_and_what_changed_since_the_training(run: RunDir, recipe: Recipe) -> None:
    generated = {"sampling": {"temperature": 0.3}, "completed": 9}
    filtered = {"rules": [], "rows": 9, "kept": 6, "keep_rate": 2 / 3, "dropped_by_rule": {}}
    record_lineage(run, "generate", generated)
    record_lineage(run, "filters", filtered)
    report = evaluate_run(recipe, run, Path("my recipe.yaml"), speed=False, flags=["--train.epochs", "3"])
    assert report.commands[-1] == f"python -m evaluate 'my recipe.yaml' --train.epochs 3 --run {run.path}"
    assert report.lineage["filters"] == filtered  # the student has no lineage of its own
    shutil.copyfile(run.lineage, run.student / "lineage.json")  # as training does
    assert evaluate_run(recipe, run, PATH, speed=False).notes == report.notes
    record_lineage(run, "generate", generated | {"last_call": {"answered": 0}})
    assert not any("again after the student was trained" in note for note in report.notes)
    for stage, section, done in (
        ("generate", generated | {"sampling": {"temperature": 1.3}}, "generated"),
        ("filters", filtered | {"kept": 2}, "generated and filtered"),
    ):
        record_lineage(run, stage, section)
        again = evaluate_run(recipe, run, PATH, speed=False)
        assert any(f"were {done} again after the student was trained" in note for note in again.notes)
        assert (again.lineage["generate"], again.lineage["filters"]) == (generated, filtered)
        assert "evaluate" not in again.lineage
    assert evaluate_run(recipe, run, PATH, speed=False).created == again.created  # up to date


def test_a_student_of_another_teacher_than_the_recipes_is_told(
    run: RunDir, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    record_lineage(RunDir(run.student), "generate", {"teacher": {"asked": recipe.teacher.model}})
    report = evaluate_run(recipe, run, PATH, speed=False)
    assert "taught the student" not in capsys.readouterr().err and "taught the student" not in str(report.notes)
    record_lineage(RunDir(run.student), "generate", {"teacher": {"asked": "gpt-4.1", "earlier": ["gpt-4o"]}})
    told = f"gpt-4.1 and gpt-4o taught the student, but the teacher here is the recipe's, {recipe.teacher.model}"
    run.checks.write_text('{"checks": []}')  # one of the files that a report is made of
    report = evaluate_run(recipe, run, PATH, speed=False)
    assert f"warning: {told}\n" in capsys.readouterr().err and told in report.notes


def test_report_only_measures_nothing(
    run: RunDir, recipe: Recipe, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="nothing measured yet"):
        evaluate_run(recipe, run, PATH, report_only=True)
    evaluate_run(recipe, run, PATH, speed=False)
    loaded.clear()
    run.report_html.write_text("old")
    evaluate_run(recipe, run, PATH, report_only=True, force=True)
    assert loaded == [] and run.report_html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "leaves the report" not in capsys.readouterr().err
    shift_weights(run.student)
    assert perplexity_in(evaluate_run(recipe, run, PATH, report_only=True), AFTER) is None
    assert "warning: what was measured of student after is of other weights" in capsys.readouterr().err


def test_a_row_too_long_for_one_model_counts_for_none(run: RunDir, recipe: Recipe) -> None:
    config = run.student / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 80'))
    rows = evaluate_run(recipe, run, PATH, speed=False).rows
    assert rows.scored + rows.left_out == ROWS and 0 < rows.left_out < ROWS


def test_a_teacher_behind_a_paid_api_is_not_available(run: RunDir, recipe: Recipe, loaded: list[str]) -> None:
    teacher = recipe.teacher.model_copy(update={"model": "gpt-4.1", "base_url": "https://api.example.com/v1"})
    report = evaluate_run(recipe.model_copy(update={"teacher": teacher}), run, PATH, speed=False)
    assert loaded == ["student_before", "student_after"]
    assert perplexity_in(report, TEACHER) is None
    assert "teacher: not available: the teacher answers at api.example.com" in report.notes[0]
    assert "(teacher" not in report.headline.text


def test_a_teacher_elsewhere_is_scored_if_its_folder_is_here_however_it_is_written(
    recipe: Recipe, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    teacher = recipe.teacher.model_copy(update={"model": "models/mine", "base_url": "https://api.example.com/v1"})
    monkeypatch.setattr("evaluate.models.check_trained", lambda recipe, run: recipe.student)
    assert subjects(recipe.model_copy(update={"teacher": teacher}), run)[0].folder == Path("models/mine")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run.student), "no student yet; run train"),
        (lambda run: run.test.unlink(), "no test rows; run train"),
        (lambda run: run.test.write_bytes(b""), "no rows in it"),
        (lambda run: run.test.write_bytes(b'{"id": 1}\n'), "test.jsonl:1: "),
        (lambda run: (run.student / "training_log.json").write_text("{"), "training_log.json: "),
        (lambda run: run.filter_report.write_text("[]"), "filter_report.json: "),
        (
            lambda run: (run.student / "lineage.json").write_text('{"train": {"teacher": "another"}}'),
            "trained with teacher 'another', but the recipe says",
        ),
        (
            lambda run: (run.student / "lineage.json").write_text('{"train": {"system": "Be a pirate."}}'),
            "trained with system 'Be a pirate.', but the recipe says None; train again",
        ),
        (
            lambda run: (run.student / "lineage.json").write_text('{"train": {"parts": {"seed": 9, "test": 0.5}}}'),
            r"trained when the prompts were parted otherwise \(seed 9, test 0\.5\), so it may know what it would be",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: RunDir, recipe: Recipe, break_it: Any, message: str) -> None:
    break_it(run)
    with pytest.raises(UsageError, match=message) as caught:
        evaluate_run(recipe, run, PATH, speed=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", [{"model": "prune:2"}, {"model": "new:1m"}, {"chat_template": "chatml"}])
def test_a_student_that_was_made_first_needs_its_beginning(
    run: RunDir, recipe: Recipe, tmp_path: Path, made: dict[str, str]
) -> None:
    assert recipe.student
    given = recipe.model_copy(update={"student": recipe.student.model_copy(update=made)})
    with pytest.raises(UsageError, match="student-init"):
        subjects(given, run)
    shutil.copytree(tmp_path / "base", run.student_init)
    before = subjects(given, run)[1]
    assert before.folder == run.student_init
    digests = set()
    for seed in (0, 1):  # weights of another seed are of the same size
        (run.student_init / "built.json").write_text(json.dumps({"seed": seed}))
        digests.add(digest_subject(before))
    assert len(digests) == 2


def test_a_run_that_was_moved_has_its_own_beginning_under_its_adapter(
    run: RunDir, recipe: Recipe, tmp_path: Path
) -> None:
    moved = RunDir(tmp_path / "moved")
    for folder in (moved.student, moved.student_init):
        folder.mkdir(parents=True)
    (moved.student_init / "config.json").write_text("{}")
    evaluated = recipe.evaluate.model_copy(update={"models": [str(moved.path)]})
    given = recipe.model_copy(update={"evaluate": evaluated})
    for base, folder in (
        (tmp_path / "gone" / "student-init", moved.student_init),
        (tmp_path / "base", tmp_path / "base"),  # another model, though there is a beginning
    ):
        (moved.student / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        other = subjects(given, run)[3]
        assert (other.label, other.folder, other.adapter) == ("student of moved", folder, moved.student)


def test_weights_are_counted_as_transformers_counts_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = measure_weights(folder)
    assert weights and weights.parameters == model.num_parameters()
    assert weights.size_bytes == 4 * weights.parameters
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert measure_weights(tmp_path / "shards") == weights
    assert measure_weights(tmp_path) is None


def quantise(folder: Path) -> None:
    """As a model in AWQ says of itself; to read it takes a package that is not here."""
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))


def test_parameters_of_packed_weights_are_those_of_the_configuration(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = tiny_model(tmp_path / "model")
    whole = measure_weights(folder)
    quantise(folder)
    save_file({"packed": np.zeros(3, np.int32)}, folder / "model.safetensors")
    assert whole and measure_weights(folder) == (whole.parameters, 12)


def test_a_quantised_teacher_that_cannot_be_read_here_has_no_perplexity_and_all_else(
    run: RunDir, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantise(tmp_path / "teacher")
    report = evaluate_run(recipe, run, PATH, speed=False)
    assert perplexity_in(report, TEACHER) is None and perplexity_in(report, AFTER)
    assert report.models[0].figure("engine", "parameters") and "teacher: perplexity was not measured." in report.notes
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: teacher"))
    assert "perplexity not available: cannot load" in line and "AWQ" in line


def make_adapter(base: Path, folder: Path, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def test_an_adapter_is_laid_over_its_base_and_merged_for_the_engine(
    run: RunDir, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.rmtree(run.student)
    make_adapter(tmp_path / "base", run.student, seed=1)
    _, before, after = subjects(recipe, run)
    assert after.adapter == run.student and after.folder == before.folder
    rows = story_rows(3)

    def score(subject: Any) -> float:
        return perplexity_of(score_rows(*load(subject, dtype="float32", device="cpu"), rows))

    merged = engine_folder(after, run)
    assert score(after) != pytest.approx(score(before), rel=1e-3)
    assert score(replace(after, folder=merged, adapter=None)) == pytest.approx(score(after), rel=1e-4)
    assert measure_weights(merged) == measure_weights(tmp_path / "base")

    stamp = (merged / "model.safetensors").stat().st_mtime_ns
    assert (engine_folder(after, run) / "model.safetensors").stat().st_mtime_ns == stamp
    make_adapter(tmp_path / "base", run.student, seed=2)
    engine_folder(after, run)
    assert (merged / "model.safetensors").stat().st_mtime_ns != stamp
    assert not list(merged.parent.glob("*.tmp"))


def test_an_adapter_that_peft_alone_saved_has_the_tokenizer_of_its_base(
    run: RunDir, recipe: Recipe, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "base", other := tmp_path / "other", seed=1)
    for file in (*other.glob("tokenizer*"), *other.glob("chat_template*")):
        file.unlink()
    evaluated = recipe.evaluate.model_copy(update={"models": [str(other)]})
    subject = subjects(recipe.model_copy(update={"evaluate": evaluated}), run)[-1]
    assert subject.adapter == other
    merged = AutoTokenizer.from_pretrained(engine_folder(subject, run))
    known = load(subject, dtype="float32", device="cpu")[1]
    assert known.chat_template == merged.chat_template == CHATML and known.get_vocab() == merged.get_vocab()


def test_the_command_prints_the_table(
    run: RunDir, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    main([str(path), "--run", str(run.path), "--no-speed"])
    out = capsys.readouterr().out
    assert "before" in out and "perplexity" in out and "Speed and peak memory were not measured." in out
    assert str(run.report_html) in out
    with pytest.raises(DataError, match=r"test\.jsonl"):
        run.test.write_bytes(b"{}\n")
        main([str(path), "--run", str(run.path), "--no-speed"])
