"""What is said when nothing answers: a server of one's own is started, a remote one needs its address and its key."""

from pathlib import Path

import pytest

from generate.client import no_endpoint
from generate.run import generate
from pipeline.errors import DistillError
from pipeline.filters_config import JudgeConfig
from pipeline.prompts_config import UserConfig
from pipeline.rundir import RunDir
from pipeline.teacher_config import TeacherConfig
from tests.servers.misbehaving_server import error, misbehaving, recipe_for

WHY = "Name or service not known"


@pytest.mark.parametrize(("key", "named"), [(None, True), ("a-key-of-mine", False)])
def test_a_remote_host_is_not_started_here_and_a_missing_key_is_named(
    monkeypatch: pytest.MonkeyPatch, key: str | None, named: bool
) -> None:
    monkeypatch.setenv("MY_KEY", key or "")
    teacher = TeacherConfig(model="gpt-4.1", base_url="https://api.openai.com/v1", api_key_env="MY_KEY")
    said = str(no_endpoint(teacher, teacher.url, WHY))
    assert said.startswith(f"no endpoint at https://api.openai.com/v1 ({WHY}); check teacher.base_url")
    assert "make serve" not in said
    assert ("MY_KEY" in said) == named


@pytest.mark.parametrize(
    ("named", "section"),
    [(JudgeConfig, "judge"), (UserConfig, "prompts.user")],
)
def test_who_else_is_asked_is_named_by_its_own_keys(
    named: type[JudgeConfig | UserConfig], section: str, tmp_path: Path
) -> None:
    teacher = TeacherConfig(model="m", base_url="http://gpu-box:8000/v1")
    other = teacher.another(named(model="big", base_url="http://gpu-box:9000/v1"), section)
    assert f"start big there, or set {section}.base_url" in str(no_endpoint(other, other.url, WHY))
    away = teacher.another(named(model="big", base_url="https://api.openai.com/v1"), section)
    assert f"check {section}.base_url" in str(no_endpoint(away, away.url, WHY))
    with misbehaving(lambda asked: error(404, "no model big"), models=["small"]) as server:
        other = teacher.another(named(model="big", base_url=server.url), section)
        recipe = recipe_for(server).model_copy(update={"teacher": other})
        with pytest.raises(DistillError, match=rf"it lists small: set {section}\.model to one of them"):
            generate(recipe, RunDir(tmp_path), quiet=True)


def test_a_server_of_ones_own_is_started() -> None:
    teacher = TeacherConfig(model="m", base_url="http://gpu-box:8000/v1")
    assert "start the teacher with `make serve`" in str(no_endpoint(teacher, teacher.url, WHY))


def test_an_address_that_is_nearly_right_is_told() -> None:
    teacher = TeacherConfig(model="m", base_url="https://gpu-box:8000/v1")
    why = "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1016)"
    assert str(no_endpoint(teacher, teacher.url, why)).endswith("; begin teacher.base_url with http://")
    why = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1016)"
    assert str(no_endpoint(teacher, teacher.url, why)).endswith("its authority's certificate in SSL_CERT_FILE")
