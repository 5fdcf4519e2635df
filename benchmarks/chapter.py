"""`python -m benchmarks.chapter`: the reference loop (transformers, one prompt at a time) against this system.

The same model, prompts, dtype and sampling on the same machine. Our side uses a real server, which is warm before the
clock starts, as the loop's model is. The sides take turns. A few prompts (`--loop-prompts`) give the
loop's rate. Prints the medians of tokens per second, and their ratio.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.measure import flags
from benchmarks.runs import recipe_for, run_quietly
from generate.prompts import iter_prompts
from pipeline.cli import run_stage
from pipeline.models import resolve_model
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from serve.server import free_port, serving

MODEL = "embedded:smollm2-135m"


def main() -> None:
    options = flags(__doc__, model=MODEL, loop_prompts=8, prompts=256, max_tokens=128, runs=3)
    rates: dict[str, list[float]] = {"loop": [], "ours": []}
    with (
        serving(options.model, port=free_port(), config=ServeConfig()) as server,
        tempfile.TemporaryDirectory() as folder,
    ):

        def recipe(prompts: int) -> Recipe:
            about, sampling = {"model": server.served_name}, {"max_tokens": options.max_tokens}
            return recipe_for(Path(folder), server.base_url, prompts, about, sampling=sampling)

        dtype = server.command.dtype or "float32"
        loop = load_loop(options.model, dtype)
        loop(recipe(1))  # warm-up
        ours(recipe(options.loop_prompts))
        for _ in range(options.runs):
            rates["loop"].append(loop(recipe(options.loop_prompts)))
            rates["ours"].append(ours(recipe(options.prompts)))
            print({side: round(taken[-1], 1) for side, taken in rates.items()}, file=sys.stderr)
    slow, fast = median(rates["loop"]), median(rates["ours"])
    print(f"{options.model}, {dtype}: the loop {slow:.1f} tok/s, ours {fast:.1f} tok/s: {fast / slow:.1f} times")


def load_loop(model: str, dtype: str) -> Callable[[Recipe], float]:
    """The reference loop: returns a function from a recipe to its tokens per second."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(recipe: Recipe) -> float:
        sampling, tokens, started = recipe.sampling, 0, time.perf_counter()
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        shape = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        for prompt in iter_prompts(recipe):
            turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
            inputs = tokenizer.apply_chat_template(turns, **shape)
            with torch.inference_mode():
                answer = teacher.generate(**inputs, max_new_tokens=sampling.max_tokens, **drawn)
            tokens += answer.shape[1] - inputs["input_ids"].shape[1]
        return tokens / (time.perf_counter() - started)

    return run


def ours(recipe: Recipe) -> float:
    """`generate` on a fresh run directory: tokens per second."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run_quietly(recipe, RunDir(Path(folder)))
        assert not summary.failed, summary
        return summary.completion_tokens / summary.wall_s


if __name__ == "__main__":
    run_stage(main)
