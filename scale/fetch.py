"""`python -m scale.fetch URL [FOLDER]`: brings a run home from its store, with all answers that are there.

Takes no lease: a run that is still worked on comes as it is now. Run again, it brings what is new, and leaves files
that were changed here as they are.
"""

import argparse
import sys
from pathlib import Path

from pipeline.cli import run_stage
from pipeline.errors import UsageError
from pipeline.rundir import CHAIN_LOCK, LOCK, RunDir
from scale.journals import JOURNALS
from scale.parts import compact
from scale.storage import open_store
from scale.sync import STATE_FILE, Mirror, StoreState


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scale.fetch", description="Brings a run home from its store.")
    parser.add_argument("url", help="s3://bucket/path, gs://bucket/path or file:///folder")
    parser.add_argument("folder", type=Path, nargs="?", help="where to (default: runs/<last part of the URL>)")
    options = parser.parse_args(argv)
    if not options.url:
        raise UsageError("no URL of a run is given; give it: make fetch RUN=s3://bucket/path")
    store = open_store(options.url)
    if not store.names():
        raise UsageError(f"{options.url}: there is nothing")
    folder = options.folder or Path("runs") / options.url.rstrip("/").rpartition("/")[2]
    other = folder.exists() and any(path.name not in (LOCK, CHAIN_LOCK) for path in folder.iterdir())
    if other and not (folder / STATE_FILE).exists():
        raise UsageError(f"{folder}: holds another run; name an empty folder after the URL")
    with RunDir(folder).locked(new=True):
        state = StoreState.read(folder)
        if state.source not in ("", store.url):
            raise UsageError(f"{folder}: was fetched from {state.source}; name another folder after the URL")
        state.source = store.url
        mirror = Mirror(store, folder, state)
        if left := mirror.leave_changed():
            print(
                f"{folder}: was changed here, so it stays as it is: {', '.join(left)}; to have what {store.url} has, "
                "remove it and fetch again",
                file=sys.stderr,
            )
        try:
            mirror.fetch()
        finally:
            state.left = None
            state.save(folder)  # with the names of the store's files: the next call removes those that are gone there
        for journal in (path for name in JOURNALS for path in folder.rglob(name)):
            compact(journal)
    print(folder)


if __name__ == "__main__":
    run_stage(main)
