"""A disk that is full, and one without locks: the errors name no file."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """A file may have so many bytes until the block ends; more are refused with EFBIG ("File too large")."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def without_locks(*_: object) -> None:
    """Stands where `flock` is, as on some network file systems."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
