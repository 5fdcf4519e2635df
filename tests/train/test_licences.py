"""The licence table: what it says of well-known teachers, and what follows for a student."""

import pytest

from train.checks.licences import LicenceChain, Terms, licence_check, licence_table, on_the_hub, terms_of


@pytest.mark.parametrize(
    ("teacher", "licence", "verdict"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "apache-2.0", "allowed"),
        ("./models/Qwen2.5-Coder-0.5B-Instruct", "apache-2.0", "allowed"),
        ("Qwen/Qwen2.5-3B-Instruct", "qwen-research", "restricted"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen", "conditions"),
        ("Qwen/Qwen2-72B-Instruct", "tongyi-qianwen", "forbidden"),
        ("Qwen/Qwen3-8B", "apache-2.0", "allowed"),
        ("embedded:smollm2-135m", "apache-2.0", "allowed"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2", "forbidden"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", "forbidden"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3.1", "conditions"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3", "conditions"),
        ("google/gemma-2-9b-it", "gemma", "conditions"),
        ("google/gemma-4-31B-it", "apache-2.0", "allowed"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "apache-2.0", "allowed"),
        ("mistralai/Mistral-Large-Instruct-2411", "mrl", "restricted"),
        ("deepseek-ai/DeepSeek-R1", "mit", "allowed"),
        ("deepseek-ai/DeepSeek-V3", "deepseek", "conditions"),
        ("deepseek-chat", "deepseek-platform", "allowed"),
        ("gpt-4.1", "openai-terms", "restricted"),
        ("o3-mini", "openai-terms", "restricted"),
        ("openai/gpt-oss-120b", "apache-2.0", "allowed"),
        ("claude-sonnet-4", "anthropic-terms", "restricted"),
        ("gemini-2.5-pro", "gemini-terms", "restricted"),
    ],
)
def test_well_known_teachers_are_in_the_table(teacher: str, licence: str, verdict: str) -> None:
    terms = terms_of(teacher)
    assert terms is not None
    assert (terms.licence, terms.verdict) == (licence, verdict)


@pytest.mark.parametrize(
    "name", ["my-gpt-4-killer", "openai-community/gpt2", "qwen-max", "student", "./runs/x/student"]
)
def test_terms_that_nobody_knows_stop_no_training_and_ask_to_be_stated(name: str) -> None:
    assert terms_of(name) is None
    check = licence_check(name, terms_of(name), "student")
    assert (check.status, check.value) == ("note", None)
    assert check.fix == "state them in the recipe, in a licence's name or your own words: train.teacher_licence"


@pytest.mark.parametrize(
    ("teacher", "student", "status"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "pass"),
        ("google/gemma-3-27b-it", "HuggingFaceTB/SmolLM2-135M-Instruct", "note"),
        ("gpt-4.1", "Qwen/Qwen2.5-0.5B-Instruct", "warn"),
        ("meta-llama/Meta-Llama-3-70B", "Qwen/Qwen2.5-0.5B-Instruct", "fail"),
        ("meta-llama/Meta-Llama-3-70B", "meta-llama/Llama-3.2-1B-Instruct", "note"),
    ],
)
def test_the_verdict_decides_the_status(teacher: str, student: str, status: str) -> None:
    check = licence_check(teacher, terms_of(teacher), student)
    assert check.status == status
    assert "not legal advice" in check.finding and licence_table().read in check.finding


def test_a_card_speaks_for_a_name_that_is_not_known_and_the_recipe_before_both() -> None:
    assert terms_of("mine", card_licence="MIT") == terms_of("mine", stated="mit")
    gemma = terms_of("mine", card_licence="gemma")
    assert gemma is not None and gemma.inherits
    stated = terms_of("gpt-4.1", stated="agreement of 2026-01")
    assert stated is not None and (stated.verdict, stated.source) == ("allowed", "your word in train.teacher_licence")
    assert licence_check("gpt-4.1", stated, "student").status == "pass"


def found(reference: str) -> Terms:
    terms = terms_of(reference)
    assert terms is not None
    return terms


@pytest.mark.parametrize(
    ("teacher", "base", "student"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0"),
        ("deepseek-ai/DeepSeek-R1", "Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0"),
        ("google/gemma-2-9b-it", "Qwen/Qwen2.5-0.5B-Instruct", "gemma"),
        ("google/gemma-2-9b-it", "meta-llama/Llama-3.2-1B-Instruct", "other"),  # two that both want to be the licence
        ("Qwen/Qwen2.5-7B-Instruct", "google/gemma-2-2b-it", "gemma"),
        ("gpt-4.1", "Qwen/Qwen2.5-0.5B-Instruct", "other"),
    ],
)
def test_what_follows_for_the_student(teacher: str, base: str, student: str) -> None:
    assert LicenceChain(found(teacher), found(base)).student == student


@pytest.mark.parametrize(
    ("teacher", "student"), [("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"), ("google/gemma-2-9b-it", "other")]
)
def test_a_new_student_has_no_licence_of_its_own(teacher: str, student: str) -> None:
    assert LicenceChain(found(teacher), None, new=True).student == student


def test_an_unknown_link_leaves_the_licence_open() -> None:
    assert LicenceChain(None, found("Qwen/Qwen3-8B")).student == "other"
    assert LicenceChain(found("Qwen/Qwen3-8B"), None).student == "other"


def test_the_hub_is_given_names_that_it_knows() -> None:
    assert on_the_hub("apache-2.0") == {"license": "apache-2.0"}
    assert on_the_hub("qwen") == {"license": "other", "license_name": "qwen"}
    assert on_the_hub("other") == {"license": "other", "license_name": "see-licence-chain"}


def test_every_entry_names_its_source_and_what_it_asks() -> None:
    for terms in licence_table().terms:
        assert terms.source.startswith("https://") and terms.asks
        assert (terms.verdict == "forbidden") == bool(terms.student)
