"""One model in a plain terminal: one question per line, the answer as it streams. Writes to standard output only."""

import asyncio
import contextlib
import io
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing

from rich.console import Console

from chat.answer import LOOK_S, Answered, answer
from chat.models import Model
from pipeline.cli import CONTROL
from pipeline.errors import DistillError
from pipeline.records import Message

CLEAR = "/clear"


def talk(model: Model, begin: Sequence[Message]) -> None:
    """Talks until the input ends; `begin` is what a conversation begins with. Ctrl-C stops an answer.

    Raises DistillError if the model's server does not start.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not of its encoding must not end the talk
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # earlier questions with the arrow keys

    with console.status("") as status:
        while model.state == "starting":
            status.update(f"{model.label}: {model.said}")
            time.sleep(LOOK_S)
    if model.state == "failed":
        raise DistillError(model.said)
    console.print(f"{model.label}, {model.told}. {CLEAR} begins anew, Ctrl-C stops an answer, Ctrl-D ends.")
    for turn in model.asked(begin):
        console.print(f"{turn.role}: {CONTROL.sub('', turn.content)}", style="dim")
    conversation = list(begin)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            console.print()
            return
        if question == CLEAR:
            conversation = list(begin)
        elif question:
            asked = [*conversation, Message("user", question)]
            if text := _ask(model, asked, console):
                conversation = [*asked, Message("assistant", text)]


def _ask(model: Model, conversation: list[Message], console: Console) -> str:
    """Prints the answer as it comes, and returns it, also if it was stopped; empty if there is none."""
    said: list[str] = []

    async def show() -> str:
        async with aclosing(answer(model, conversation, asyncio.Lock())) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answered):
                    console.print(f"\n{piece.figures}", style="dim")
                    return piece.text
                said.append(piece)
                console.out(CONTROL.sub("", piece), end="", highlight=False)
        return ""

    try:
        return asyncio.run(show())
    except KeyboardInterrupt:
        console.print("\nstopped", style="dim")
    except DistillError as error:
        console.print(f"\nerror: {CONTROL.sub('', str(error))}", style="red")
    return "".join(said)
