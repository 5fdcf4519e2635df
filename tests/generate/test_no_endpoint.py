"""What is said when nothing answers: a server of one's own is started, a remote one needs its address and its key."""

import pytest

from generate.client import no_endpoint
from pipeline.recipe import TeacherConfig

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


def test_a_server_of_ones_own_is_started() -> None:
    teacher = TeacherConfig(model="m", base_url="http://gpu-box:8000/v1")
    assert "start the teacher with `make serve`" in str(no_endpoint(teacher, teacher.url, WHY))
