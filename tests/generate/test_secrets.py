"""No secret leaves the client in a message: the key, headers' variables, a proxy's password, what looks like a key."""

import pytest

from generate.run import generate
from pipeline.errors import DistillError
from pipeline.rundir import RunDir
from tests.generate.test_odd_servers import raw_server
from tests.servers.misbehaving_server import Asked, Behaviour, answer, error, failures, misbehaving, raw, recipe_for

TENANT, PASSWORD, OTHER_KEY = "tenant-secret-42", "hunter2hunter2", "sk-or-v1-0123456789abcdef0123"


pytestmark = pytest.mark.usefixtures("quick")


def written(run: RunDir) -> str:
    return "".join(path.read_text() for path in run.path.iterdir() if path.is_file() and path.name != "recipe.yaml")


@pytest.mark.parametrize("status", [200, 400, 500])
def test_what_a_gateway_echoes_is_hidden(
    run: RunDir, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TENANT", TENANT)

    def script(asked: Asked) -> Behaviour:
        assert asked.headers["X-Tenant"] == TENANT
        words = f"rejected: X-Tenant={asked.headers['X-Tenant']} Authorization: Bearer {OTHER_KEY}"
        if asked.text != "say 3":
            return answer()
        return error(status, words) if status != 200 else raw(f"<html>{words}</html>".encode())

    with misbehaving(script) as server:
        teacher = {"model": "stub", "base_url": server.url, "headers": {"X-Tenant": "${TENANT}"}}
        generate(recipe_for(server, 10, teacher=teacher), run)
    (failure,) = failures(run)
    assert failure.message.count("[secret]") == 2
    for secret in (TENANT, OTHER_KEY):
        assert secret not in written(run) + "".join(capsys.readouterr())


def test_a_proxy_s_password_is_hidden(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A proxy that answers badly: the client's error would name its whole URL."""
    monkeypatch.setattr("pipeline.address.is_loopback", lambda url: False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with raw_server(b"HTTP/1.1 502 Bad\r\n\r\n") as proxy:
        address = proxy.removeprefix("http://").removesuffix("/v1")
        monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD}@{address}")
        recipe = recipe_for("https://teacher.example/v1", 1, generate={"max_attempts": 1, "give_up_s": 0.2})
        try:
            generate(recipe, run)
        except DistillError as error:
            said = str(error)
        else:
            said = ""
    assert failures(run) or said
    assert PASSWORD not in said + written(run) + "".join(capsys.readouterr())


def test_what_a_server_says_cannot_steer_the_terminal(run: RunDir) -> None:
    words = "\x1b]52;c;ZXZpbA==\x07 gone\x1b[2J \x9b31m\x00 \u00e9"
    with misbehaving(lambda asked: error(402, words)) as server, pytest.raises(DistillError) as caught:
        generate(recipe_for(server), run, quiet=True)
    assert "]52;c;ZXZpbA== gone [2J 31m é" in str(caught.value) and str(caught.value).isprintable()
