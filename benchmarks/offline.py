"""vLLM without a server, for `saturation`: `load` once and then `answer`, in a process that does nothing else."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

SAMPLING = ("temperature", "top_p", "max_tokens", "seed", "ignore_eos")

_engine: Any = None


def load(arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Loads the engine with the arguments and the environment of a server."""
    global _engine
    os.environ.update(env, VLLM_LOGGING_LEVEL="ERROR")
    os.dup2(2, 1)  # vLLM prints, and stdout is for the figures
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(list(arguments))
    _engine = LLM(**vars(EngineArgs.from_cli_args(parsed)))


def answer(requests: Sequence[bytes]) -> tuple[int, float, list[float]]:
    """Answers chat requests: the tokens, the seconds, and the moment of each answer's last token."""
    from vllm import SamplingParams

    bodies = [json.loads(request) for request in requests]
    sampling = [SamplingParams(**{name: body[name] for name in SAMPLING if name in body}) for body in bodies]
    started = time.perf_counter()
    answers = _engine.chat([body["messages"] for body in bodies], sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return tokens, seconds, [answer.metrics.last_token_ts for answer in answers if answer.metrics]


def unload() -> None:
    """Ends the engine's own processes."""
    global _engine
    _engine = None
