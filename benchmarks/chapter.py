"""`python -m benchmarks.chapter`: the chapter's loop (transformers, one prompt at a time) against this system.

The same model, prompts, dtype and sampling on the same machine; ours through a real server, which is up and warm before
the clock starts, as the loop's model is. The sides take turns; tokens a second, medians, and their ratio.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.clients import numbered_prompts
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.models import resolve_model
from pipeline.recipe import Recipe, ServeConfig
from pipeline.rundir import RunDir
from serve.server import free_port, serving

MODEL = "embedded:smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--loop-prompts", type=int, default=8, help="the loop is slow: a few give its rate")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"loop": [], "ours": []}
    with serving(options.model, port=free_port(), config=ServeConfig()) as server:
        dtype = server.command.dtype or "float32"
        loop = load_loop(options.model, dtype)
        few = recipe_for(server.base_url, server.served_name, options.loop_prompts, options.max_tokens)
        many = recipe_for(server.base_url, server.served_name, options.prompts, options.max_tokens)
        loop(few.model_copy(update={"prompts": few.prompts.model_copy(update={"count": 1})}))  # warm-up
        ours(few)
        for _ in range(options.runs):
            rates["loop"].append(loop(few))
            rates["ours"].append(ours(many))
            print({side: round(taken[-1], 1) for side, taken in rates.items()}, file=sys.stderr)
    slow, fast = median(rates["loop"]), median(rates["ours"])
    print(f"{options.model}, {dtype}: the loop {slow:.1f} tok/s, ours {fast:.1f} tok/s: {fast / slow:.1f} times")


def load_loop(model: str, dtype: str) -> Callable[[Recipe], float]:
    """The chapter's loop: returns a function from a recipe to its tokens a second."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(recipe: Recipe) -> float:
        tokens, started = 0, time.perf_counter()
        for job in build_jobs(iter_prompts(recipe), recipe):
            turns = [{"role": turn.role, "content": turn.content} for turn in job.request.messages]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                answer = teacher.generate(
                    **inputs,
                    max_new_tokens=recipe.sampling.max_tokens,
                    do_sample=True,
                    temperature=recipe.sampling.temperature,
                    top_p=recipe.sampling.top_p,
                )
            tokens += answer.shape[1] - inputs["input_ids"].shape[1]
        return tokens / (time.perf_counter() - started)

    return run


def ours(recipe: Recipe) -> float:
    """`generate` on a fresh run directory: tokens a second."""
    with tempfile.TemporaryDirectory() as folder:
        summary = generate(recipe, RunDir(Path(folder)), quiet=True)
        assert not summary.failed, summary
        return summary.completion_tokens / summary.wall_s


def recipe_for(url: str, model: str, prompts: int, max_tokens: int) -> Recipe:
    """So many prompts, sampled as the chapter does."""
    return Recipe(
        name="chapter",
        teacher={"model": model, "base_url": url},
        prompts=numbered_prompts(prompts),
        sampling={"temperature": 0.8, "top_p": 0.9, "max_tokens": max_tokens},
    )


if __name__ == "__main__":
    main()
