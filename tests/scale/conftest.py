"""The two kinds of store: a folder, and S3 as moto plays it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scale.storage import Store, open_store
from tests.servers.object_storage import object_storage


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_storage() as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(tmp_path.as_uri() + "/store")
    request.getfixturevalue("server")
    return open_store(f"s3://bucket/{tmp_path.name}/run")
