# Every target prepares what it needs in .venv; `make <stage>` is `python -m <stage>`.
RECIPE ?= recipes/korean_stories.yaml
PYTHON ?= python3
# Where the CPU build of torch is, if pip's own configuration does not know.
export TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu

PY := .venv/bin/python
COMMON := $(RECIPE) $(if $(RUN),--run $(RUN)) \
  $(if $(TEACHER_URL),--teacher.base_url $(TEACHER_URL)) $(if $(TEACHER_MODEL),--teacher.model $(TEACHER_MODEL))

BASE := .venv/.ready-base
SERVE := .venv/.ready-serve
TRAIN := .venv/.ready-train
REVIEW := .venv/.ready-review
DEV := .venv/.ready-dev

.PHONY: help setup serve generate filter review train export push evaluate report check-run experiment chain demo bench bench-endpoint check test test-fast clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

setup: $(BASE) $(TRAIN) $(SERVE) $(DEV)  ## everything, into .venv, once

serve: $(SERVE)  ## the recipe's teacher, behind an OpenAI-compatible endpoint (ARGS="any vLLM flags")
	@exec $(PY) -m serve $(COMMON) $(if $(ARGS),--args="$(ARGS)")

generate: $(BASE)  ## prompts to the teacher, answers to completions.jsonl (TEACHER_URL=… TEACHER_MODEL=…)
	@exec $(PY) -m generate $(COMMON) $(ARGS)

filter: $(BASE)  ## answers worth learning from to kept.jsonl, the others to dropped.jsonl
	@exec $(PY) -m filters $(COMMON) $(ARGS)

review: $(REVIEW)  ## a local page: judge a blind sample yourself, see how far the filters agree (ARGS="--sample 100")
	@exec $(PY) -m filters.review $(COMMON) $(ARGS)

train: $(TRAIN)  ## the student, on kept.jsonl
	@exec $(PY) -m train $(COMMON) $(ARGS)

export: $(TRAIN)  ## the student with its card, into export/ (ARGS="--merged --dataset")
	@exec $(PY) -m train.publish.export $(COMMON) $(ARGS)

push: $(TRAIN)  ## the same, to the Hub: REPO=owner/name, and HF_TOKEN in the environment (ARGS="--merged --dataset")
	@exec $(PY) -m train.publish.export $(COMMON) --push "$(REPO)" $(ARGS)

evaluate: $(TRAIN) $(SERVE)  ## teacher, student before and after: quality, speed, memory
	@exec $(PY) -m evaluate $(COMMON) $(ARGS)

report: $(TRAIN)  ## report.html again, from report.json
	@exec $(PY) -m evaluate $(COMMON) --report-only $(ARGS)

check-run: $(BASE)  ## the checklist of a good run, on RUN at any stage (ARGS=--strict: an unknown point fails too)
	@exec $(PY) -m evaluate.report.checklist $(COMMON) $(ARGS)

experiment: $(TRAIN) $(SERVE)  ## EXP=keep-rate|teachers|human|soft|thousand: its arms as runs, one table, one plot (docs/experiments.md)
	@exec $(PY) -m experiments $(EXP) $(COMMON) $(ARGS)

chain: $(TRAIN) $(SERVE)  ## all of it for one recipe: serve, generate, filter, train, evaluate
	@exec $(PY) -m chain $(COMMON) $(ARGS)

demo: $(TRAIN) $(SERVE)  ## the whole chain on this machine: no GPU, no model hub
	@exec $(PY) -m chain recipes/demo.yaml $(if $(RUN),--run $(RUN)) $(ARGS)

bench: $(TRAIN) $(SERVE)  ## throughput of generation on this machine, against its limits (half an hour; docs/benchmarks.md)
	@$(PY) -m benchmarks.client && $(PY) -m benchmarks.simulated && $(PY) -m benchmarks.saturation && $(PY) -m benchmarks.chapter

bench-endpoint: $(BASE)  ## the recipe's endpoint at rising concurrency: tok/s, time to first token, latency
	@exec $(PY) -m benchmarks.endpoint $(COMMON) $(ARGS)

check: $(TRAIN) $(SERVE) $(DEV)  ## lint, format, types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

test: $(TRAIN) $(SERVE) $(DEV)  ## all tests, the real chain included
	@$(PY) -m pytest $(ARGS)

test-fast: $(TRAIN) $(DEV)  ## the tests that need no real server or model
	@$(PY) -m pytest -m "not slow" $(ARGS)

clean:  ## removes .venv and caches; never a run
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info

.venv/.ready-%: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "set-up failed: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) setup_venv.py $*
