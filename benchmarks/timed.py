"""`python -m benchmarks.timed RECIPE RUN`: one run of `generate` and its CPU seconds, children included, as JSON."""

import json
import resource
import sys
from pathlib import Path

import msgspec

from generate.run import generate
from pipeline.recipe import load_recipe
from pipeline.rundir import RunDir


def main() -> None:
    recipe, folder = load_recipe(Path(sys.argv[1])), Path(sys.argv[2])
    before = _cpu_s()
    summary = generate(recipe, RunDir(folder), quiet=True)
    print(
        json.dumps(
            {
                "summary": msgspec.to_builtins(summary),
                "cpu_s": _cpu_s() - before,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


def _cpu_s() -> float:
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main()
