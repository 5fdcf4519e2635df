"""`python -m benchmarks.training_memory`: memory of a training before its first step, for runs of different length.

All that is done then: rows read, parted and checked, written for the trainer, tokenised by TRL, looked at. The student
is a new one of 1 million parameters. Pages of mapped files are not counted: the system takes them back when it must.
"""

import random
import tempfile
from pathlib import Path

from benchmarks.measure import flags, measured, question
from benchmarks.simulator import LENGTHS
from benchmarks.training import WORDS, WORDS_PER_TOKEN


def main() -> None:
    options = flags(__doc__, rows="2000,20000,200000")
    peaks = {}
    for count in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            peak, _, cpu_s, _ = measured(first_steps, Path(folder), count)
        peaks[count] = peak
        print(f"{count:,} rows: {peak:.0f} MiB, {cpu_s:.0f} CPU seconds", flush=True)
    few, many = min(peaks), max(peaks)
    print(f"{(peaks[many] - peaks[few]) * (1 << 20) / (many - few):.0f} bytes per row")


def first_steps(folder: Path, count: int) -> float:
    """MiB of memory of its own that the process has when all is ready for the first step, with kept rows of a story."""
    from rich.console import Console

    from evaluate.measure.results import answer_row
    from pipeline.recipe import Recipe
    from pipeline.records import Message, Prompt, encode_line
    from pipeline.rundir import RunDir
    from train.checks.data import row_checks, token_checks
    from train.checks.pair import pair_checks
    from train.rows import read_parts, to_examples
    from train.student import initial_student, load_tokenizer
    from train.trainer import prepare

    rng, run = random.Random(0), RunDir(folder)
    with run.kept.open("wb") as file:
        for number in range(count):
            story = " ".join(rng.choices(WORDS, k=round(rng.choice(LENGTHS) * WORDS_PER_TOKEN)))
            prompt = Prompt(id=str(number), messages=[Message("user", question(number))])
            file.write(encode_line(answer_row("x", prompt, story)))
    train = {"method": "full", "learning_rate": 1e-3, "max_length": 8192}
    prompts = {"template": "Hi", "count": 1}
    recipe = Recipe(name="x", teacher={"model": "x"}, student={"model": "new:1m"}, prompts=prompts, train=train)
    parts = read_parts(recipe, run)
    student = initial_student(recipe, run, parts.train[:1000])
    checks = [*row_checks(parts, {}, recipe.train)]
    checks += pair_checks(recipe, student, load_tokenizer(student), parts.all, allow_chain=False)
    examples = {part: to_examples(getattr(parts, part)) for part in ("train", "validation")}
    prepared = prepare(student, examples, recipe.train, folder / "training", Console(quiet=True))
    checks += token_checks(prepared, (row.id for row in parts.all), recipe.train)
    next(iter(prepared.trainer.get_train_dataloader()))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


if __name__ == "__main__":
    main()
