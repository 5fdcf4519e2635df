"""`python -m scale.run_in_store STAGE RECIPE … --run URL [--take-over]`: what `python -m STAGE … --run URL` becomes.

Takes the run's lease, fetches what the store has into a folder of this machine, and runs the stage there, as on any
local run. Meanwhile puts its answers into the store as parts, at the end its other files. docs/storage.md says what is
lost when.
"""

import argparse
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import msgspec

from generate.budget import Spend, read_account
from generate.journal import read_journal
from pipeline.child import run_child, shell_code
from pipeline.cli import run_stage
from pipeline.errors import INTERRUPTED, DistillError, RequestsFailed
from pipeline.records import Completion
from pipeline.rundir import RunDir, write_json
from pipeline.students import AFTER, BEFORE
from scale.run_lease import BEAT_S, Lease, TakenOver, held, is_held, is_last, repeated
from scale.storage import cloud_endpoint, open_store
from scale.sync import Mirror, StoreState
from serve.named import KEYS

WITHOUT_RUN = ("serve", "benchmarks.endpoint")  # they write nothing of the run but a log, and read its student at most
CACHE = Path("runs") / "stored"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scale.run_in_store", allow_abbrev=False, add_help=False)
    parser.add_argument("stage")
    parser.add_argument("--run", required=True)
    parser.add_argument("--take-over", action="store_true")
    options, arguments = parser.parse_known_args(argv)
    folder = cache_folder(options.run)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", options.stage, *arguments, "--run", str(folder)]
    if options.stage in WITHOUT_RUN:
        flags = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
        flags.add_argument("--model", type=KEYS.get)
        if flags.parse_known_args(arguments)[0].model in (AFTER, BEFORE):
            fetch_student(options.run, folder)
        sys.exit(shell_code(run_child(command)))
    by_nodes = options.stage == "train" and any(flag.split("=")[0] == "--cluster" for flag in arguments)
    sys.exit(run_in_store(command, options.run, folder, take_over=options.take_over, by_nodes=by_nodes))


def cache_folder(url: str) -> Path:
    """Where a run of a store is on this machine. Stores at two endpoints may have the same URL."""
    url = url.rstrip("/")
    return CACHE / sha256(f"{cloud_endpoint()} {url}".encode()).hexdigest()[:8] / (url.rpartition("/")[2] or "run")


def fetch_student(url: str, folder: Path) -> None:
    """Brings the student, for a command that takes no lease; not where this folder has the newest files."""
    store = open_store(url)
    if is_held(folder):
        return  # by a command that has fetched it
    with held(folder):
        state = StoreState.read(folder)
        if not is_last(store, state.owner, state.lease):
            Mirror(store, folder, state).fetch_student()
            state.save(folder)


def run_in_store(command: list[str], url: str, folder: Path, *, take_over: bool = False, by_nodes: bool = False) -> int:
    """Runs a command that works on the folder, as the run's only holder. Returns its exit code.

    `by_nodes`: it has other machines train, which fetch the run's files and put there what they write (scale.training).
    Raises UsageError if another process has the run, DistillError if the store cannot be reached: what the command has
    done is in the folder then, and the same command goes on.
    """
    store = open_store(url)
    with held(folder) as handle:
        state = StoreState.read(folder)
        state.url = store.url
        state.save(folder)
        lease = Lease.take(store, state.owner, take_over=take_over)
        mirror = Mirror(store, folder, state, lease.check)

        def put_training() -> None:
            with suppress(TakenOver):  # the signs of life meet it too, and stop this
                mirror.put_training()

        print(f"{url}: works in {folder}", file=sys.stderr)
        with repeated(lambda: lease.beat(mirror.unstored), "signs of life", BEAT_S):  # also while it fetches and puts
            mirror.fetch(keep=is_last(store, state.owner, state.lease))
            if lease.lost:
                print(f"{url}: {charge_lost(folder, lease.lost)}", file=sys.stderr)
                mirror.upload()
                lease.counted()
            if by_nodes:
                mirror.push()  # what an earlier call could not
            state.lease = "" if by_nodes else lease.name  # until it is fetched, what is here may be older
            state.save(folder)
            try:
                with repeated(mirror.upload, "the answers"), repeated(put_training, "checkpoints and student"):
                    code = run_child(command, pass_fds=[handle])
            except KeyboardInterrupt:
                code = INTERRUPTED
            try:
                if by_nodes and code == 0:
                    mirror.fetch_trained()
                    state.lease = lease.name
                _put_back(mirror, lease, folder, whole=code in (0, RequestsFailed.exit_code))
            except TakenOver:
                raise
            except DistillError as error:
                raise DistillError(
                    f"{error}; what is not in the store is in {folder}: run the same command again"
                ) from None
            finally:
                state.save(folder)
        lease.release()
    return shell_code(code)


def charge_lost(folder: Path, unstored: dict[str, int]) -> str:
    """Counts in the run's budget what a lost machine's answers may have cost, by this run's average. Says so."""
    lost = tokens = 0
    for kind, rows in unstored.items():
        journal = folder / f"{kind}.jsonl"
        if journal.name != RunDir(folder).completions.name:
            continue
        file, found = journal.parent / "spend.json", read_journal(journal, Completion)
        account, lost = read_account(file), lost + rows
        prompt, completion = (
            -(-n * rows // max(len(found.ids), 1)) for n in (found.prompt_tokens, found.completion_tokens)
        )
        if file.exists():
            unsaid = account.unsaid + Spend.of(prompt, completion, account.price)
            write_json(file, msgspec.structs.replace(account, unsaid=unsaid))
            tokens += prompt + completion
    counted = f"; the budget counts {tokens:,} tokens for them" if tokens else ""
    return f"taken over: up to {lost:,} answers of the lost machine are asked again{counted}"


def _put_back(mirror: Mirror, lease: Lease, folder: Path, *, whole: bool) -> None:
    mirror.upload(rest=True)  # the answers, whoever has the run
    lease.check()
    with RunDir(folder).locked():
        if whole:
            mirror.compact()
        mirror.push()


if __name__ == "__main__":
    run_stage(main)
