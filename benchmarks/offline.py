"""`python -m benchmarks.offline`: vLLM without a server, for `saturation`: one process that loads the model once.

stdin: a JSON line with the server's arguments, then one a run: {"bodies": [chat requests]}. stdout: a JSON line when
ready, and one a run: {"seconds": …, "tokens": …, "ends": […]}, an end being the moment of an answer's last token.
"""

import json
import os
import sys
import time


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its processes print, too
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = json.loads(sys.stdin.readline())
    parsed, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(arguments)
    engine = LLM(**vars(EngineArgs.from_cli_args(parsed)))
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        bodies = json.loads(line)["bodies"]
        sampling = [
            SamplingParams(
                temperature=body["temperature"],
                top_p=body["top_p"],
                max_tokens=body["max_tokens"],
                seed=body["seed"],
                ignore_eos=body["ignore_eos"],
            )
            for body in bodies
        ]
        started = time.perf_counter()
        answers = engine.chat([body["messages"] for body in bodies], sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
        ends = [answer.metrics.last_token_ts for answer in answers if answer.metrics]
        print(json.dumps({"seconds": seconds, "tokens": tokens, "ends": ends}), file=channel, flush=True)


if __name__ == "__main__":
    main()
