"""Reports with made-up figures, for the tests of what is shown of them."""

import msgspec

from evaluate.document import (
    SCHEMA,
    Accuracy,
    Claim,
    Difference,
    Estimate,
    FilterSummary,
    Headline,
    LossPoint,
    ModelReport,
    ProbeSet,
    Report,
    Rows,
    RuleDrops,
    Sample,
    Scope,
    ShownAnswer,
    TrainingLog,
    WinRate,
    exactly,
)
from pipeline.checks import Check, Checklist

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>"
KOREAN = "옛날 옛적에 토끼 토토가 살았어요."


def make_report(**changes: object) -> Report:
    size = {"parameters": exactly(494_000_000), "weights_mib": exactly(942.3)}
    models = [
        _model(
            "teacher",
            "org/teacher",
            {"perplexity": Estimate(3.412, 3.2, 3.6), "bits_per_character": Estimate(1.1119, 1.05, 1.18)},
            {
                "tokens_per_s": exactly(55.12),
                "peak_rss_mib": exactly(7312.4),
                "weights_mib": exactly(2944.4),
                "parameters": exactly(1_540_000_000),
            },
        ),
        _model(
            "student_before",
            "org/student",
            {"perplexity": Estimate(48_940.2, 40_000, 60_000), "bits_per_character": Estimate(4.9, 4.5, 5.3)},
            size,
        ),
        _model(
            "student_after",
            "org/student",
            {"perplexity": Estimate(15.12, 14.8, 15.4), "bits_per_character": Estimate(1.392, 1.35, 1.45)},
            {"tokens_per_s": exactly(141.2), "peak_rss_mib": exactly(4120), **size},
        ),
    ]
    fields: dict[str, object] = {
        "schema": SCHEMA,
        "recipe": "stories",
        "fingerprint": "f",
        "created": "2026-01-01T00:00:00+00:00",
        "headline": Headline(text="student: 32% of the parameters"),
        "models": models,
        "rows": Rows(test=9, scored=9, left_out=0, prompts=8),
        "samples": [Sample(KOREAN, [ShownAnswer("teacher", KOREAN), ShownAnswer("student after", "짧아요.")])],
        "training": TrainingLog(),
        "filters": None,
        "lineage": {"generate": {"model": "org/teacher"}},
        "commands": ["python -m evaluate recipe.yaml"],
        "machine": {"cores": "2"},
        "versions": {"torch": "2"},
        "notes": ["a note"],
        **changes,
    }
    return Report(**fields)  # type: ignore[arg-type]


def _model(key: str, reference: str, test: dict[str, Estimate], engine: dict[str, Estimate]) -> ModelReport:
    figures: dict[Scope, dict[str, Estimate]] = {"test": test, "engine": engine}
    return ModelReport(key=key, label=key.replace("_", " "), reference=reference, figures=figures)


def full_report(text: str = "", words: str = KOREAN) -> Report:
    """A report with something in every section. `text` is added to each name, `words` are every longer text."""
    teacher, before, after = make_report().models
    models = [
        _probed(teacher, text, 0.82, first=0.31),
        _probed(before, text, 0.31, first=0.11),
        _probed(after, text, 0.71, first=0.11),
    ]
    claims = [
        _claim("quality_bits", "quality", 0.9, Estimate(0.92, 0.9, 0.94)),
        _claim("quality_probes", "quality", 0.9, Estimate(0.87, 0.78, 0.95)),
        _claim("quality_judge", "quality", 0.9, None),
        _claim("size", "memory", 3, Estimate(3.12, 3.12, 3.12)),
        _claim("speed", "speed", 3, Estimate(2.56, 2.56, 2.56)),
    ]
    points = [
        Check(name=f"rows{text}", wanted=words, status="fail", finding=words, fix=words),
        Check(name="keep rate", wanted="50% or more kept", status="pass", finding="60.2%"),
    ]
    answers = [
        ShownAnswer(
            model.label, words * 9, model.key, finish_reason="length", dropped_by={f"length{text}": words}, score=2
        )
        for model in models
    ]
    generate = {
        "teacher": {"asked": f"org/teacher{text}"},
        "sampling": {"temperature": 0.8},
        "requests": 2000,
        "completed": 1998,
        "spent": {"tokens": 732_331, "usd": 1.2},
        "last_call": {"wall_s": 4012.0, "answered": 1998},
    }
    return make_report(
        recipe=f"stories{text}",
        models=models,
        headline=Headline(text=f"student: 32% of the parameters{text}", claims=claims, holds=False),
        probes=ProbeSet(
            source="slots", seen=64, unseen=32, answered=96, unseen_values={"who": [words]}, judge=f"judge{text}"
        ),
        differences=[_difference("passing", 0.4), _difference("loops", -0.4), _difference("named", 0.05)],
        wins=[_win("teacher", 25, 39), _win("student_before", 70, 8)],
        checklist=Checklist(points=points, failures=points),
        training=TrainingLog(
            loss=[LossPoint(step, 4 - step / 50) for step in range(1, 101)],
            eval=[LossPoint(50, 2.5), LossPoint(100, 2.2)],
            method="lora",
            train_rows=1084,
            tokens=402_113,
            wall_s=5212.0,
        ),
        filters=FilterSummary(rows=2000, kept=1200, keep_rate=0.6, rules=[RuleDrops(f"near_duplicate{text}", 800)]),
        samples=[Sample(words, answers)],
        lineage={"generate": generate, "filters": {"rules": [{"rule": f"length{text}"}]}, f"x{text}": [text]},
        commands=[f"python -m evaluate {text}"],
        machine={f"cpu{text}": text},
        notes=[words],
    )


def verified_report(text: str = "", words: str = KOREAN) -> Report:
    """The same, with answers that were verified."""
    report = full_report(text, words)
    told = _right(
        msgspec.structs.replace(report.models[1], key="student_before_told", label=f"before, told{text}"), 0.3
    )
    models = [_right(model, share) for model, share in zip(report.models, (0.84, 0.12, 0.81), strict=True)]
    shares = {model.key: model.figures["verified"]["accuracy"] for model in [*models, told]}
    sample = Sample(
        words, [ShownAnswer("reference", words), ShownAnswer(f"teacher{text}", words, "teacher", right=True)]
    )
    wrong = ShownAnswer(f"student after{text}", words, "student_after", dropped_by={f"sql{text}": words}, right=False)
    accuracy = Accuracy(
        rules=[{"rule": f"sql{text}"}],
        prompts={"verified": 300, "verified_unseen": 100},
        told=told,
        over_teacher={"verified": Estimate(0.96, 0.91, 1.02)},
        categories={f"count{text}": shares, "join, unseen": shares},
        wrong={key: {f"sql: result{text}": 0.1, "sql: error": 0.05} for key in shares},
        samples=[msgspec.structs.replace(sample, answers=[*sample.answers, wrong])],
    )
    claims = [_claim("quality_accuracy", "quality", 0.9, Estimate(0.96, 0.91, 1.02)), *report.headline.claims[-2:]]
    headline = msgspec.structs.replace(report.headline, claims=claims)
    return msgspec.structs.replace(report, models=models, accuracy=accuracy, headline=headline)


def _right(model: ModelReport, share: float) -> ModelReport:
    right = {"accuracy": Estimate(share, share - 0.04, share + 0.04)}
    engine = {**model.figures["engine"], "answers_per_s": Estimate(40 * share, 39 * share, 41 * share)}
    parts: dict[Scope, dict[str, Estimate]] = {"verified": right, "verified_unseen": right, "engine": engine}
    return msgspec.structs.replace(model, figures={**model.figures, **parts})


def _probed(model: ModelReport, text: str, share: float, first: float) -> ModelReport:
    def figures(share: float) -> dict[str, Estimate]:
        near = Estimate(share, share - 0.1, share + 0.1)
        return {"passing": near, "named": near, "loops": near, "distinct_2": near}

    engine = {
        **model.figures["engine"],
        "tokens_per_s_alone": Estimate(11.2, 10.9, 11.5),
        "first_token_s": Estimate(first, first - 0.02, first + 0.02),
        "kv_bytes_per_token": exactly(28_672),
    }
    if speed := model.figure("engine", "tokens_per_s"):
        engine["tokens_per_s"] = Estimate(speed.value, 0.9 * speed.value, 1.1 * speed.value)
    probes = {"all": figures(share), "seen": figures(share), "unseen": figures(share - 0.1)}
    return msgspec.structs.replace(
        model,
        label=f"{model.label}{text}",
        reference=f"{model.reference}{text}",
        figures={**model.figures, **probes, "engine": engine},
        failed_rules={f"length{text}": 1 - share, "script_ratio": 0.03},
    )


def _claim(name: str, axis: str, promised: float, value: Estimate | None) -> Claim:
    fields: dict[str, object] = {"name": name, "axis": axis, "text": f"{name}, ratio", "promised": promised}
    if value is not None:
        verdict = "yes" if value.low >= promised else "not shown" if promised <= value.high else "no"
        fields |= {"value": value, "verdict": verdict}
    return Claim(**fields)  # type: ignore[arg-type]


def _difference(figure: str, by: float) -> Difference:
    improved = None if abs(by) < 0.1 else True
    better = "higher" if by > 0 else "lower"
    return Difference(
        figure=figure,
        part="all",
        model="student_after",
        against="student_before",
        change=Estimate(by, by - 0.1, by + 0.1),
        better=better,  # type: ignore[arg-type]
        improved=improved,
    )


def _win(against: str, wins: int, losses: int) -> WinRate:
    ties = 100 - wins - losses
    return WinRate(
        model="student_after",
        against=against,
        part="all",
        pairs=100,
        unjudged=1,
        wins=wins,
        losses=losses,
        ties=ties,
        rate=Estimate((wins + ties / 2) / 100, 0.3, 0.55),
        first_chosen=0.58,
        flipped=9,
    )
