"""S3 on loopback: moto's server, in a thread, with one empty bucket; its variables are set while it runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def object_storage(bucket: str = "bucket") -> Iterator[str]:
    """Yields the server's URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", url)
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_REGION", "us-east-1")
            post(url, "reset")  # all servers of a process share what is stored
            urlopen(Request(f"{url}/{bucket}", method="PUT")).close()
            yield url
    finally:
        server.stop()


def post(url: str, path: str, body: bytes = b"") -> None:
    """Tells the server to behave in another way."""
    urlopen(Request(f"{url}/moto-api/{path}", body, {"Content-Type": "text/plain"}, method="POST")).close()
