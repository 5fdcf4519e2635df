"""How the stage's files appear: staged beside the old ones, and renamed together at the end."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DistillError


@contextmanager
def staged(paths: Sequence[Path], stale: Sequence[Path] = ()) -> Iterator[Sequence[BinaryIO]]:
    """Opens files that take the places of `paths`, all of them, when the block ends well; none otherwise.

    All are on disk before the first is renamed, and no signal comes between the renames. Then `stale` files go away.
    """
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(temporary.open("wb")) for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for temporary, path in zip(temporaries, paths, strict=True):
                temporary.replace(path)
            for path in stale:
                path.unlink(missing_ok=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
    except OSError as error:
        raise DistillError(
            f"{error.filename or paths[0].parent}: {error.strerror}; no old file was replaced"
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
