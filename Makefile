# Every target prepares what it needs in .venv; `make <stage>` is `python -m <stage>`.
RECIPE ?= recipes/korean_stories.yaml
PYTHON ?= python3
# Where the CPU build of torch is, if pip's own configuration does not know.
export TORCH_INDEX_URL ?= https://download.pytorch.org/whl/cpu

# What a command may set. A misspelt name would be ignored, and a budget in it.
VARIABLES := RECIPE RUN ARGS TEACHER_URL TEACHER_MODEL MODEL CLUSTER EXP REPO TO WHEELHOUSE PART EXCLUDE MODELS PYTHON TORCH_INDEX_URL
given := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
$(foreach v,$(filter-out $(VARIABLES) SHELL MAKE% DISTILL_%,$(given)),$(error $v: no such variable; there are $(VARIABLES); to set one of the environment, write it before `make`))

PY := .venv/bin/python
# Three files of tests at a time, as many wait for a server; ARGS="-n 6" for more cores, "-n 0" for one at a time.
PYTEST := $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder
# A value as one word of the shell. A `~/` at its beginning, where three quotes stand for a moment, is the home folder.
quoted = $(subst '''~/,~/','''$(subst ','\'',$(1))')
IN_RUN := $(if $(RUN),--run $(call quoted,$(RUN)))
COMMON := $(call quoted,$(RECIPE)) $(IN_RUN) \
  $(if $(TEACHER_URL),--teacher.base_url $(call quoted,$(TEACHER_URL))) \
  $(if $(TEACHER_MODEL),--teacher.model $(call quoted,$(TEACHER_MODEL)))

BASE := .venv/.ready-base
SERVE := .venv/.ready-serve
TRAIN := .venv/.ready-train
REVIEW := .venv/.ready-review
DEV := .venv/.ready-dev
COLLECT := .venv/.ready-collect
NODES := $(if $(CLUSTER),.venv/.ready-ray)
ON_CLUSTER := $(if $(CLUSTER),--cluster $(call quoted,$(CLUSTER)))

.PHONY: help demo setup wheelhouse serve generate filter review train evaluate report check-run chain experiment chat export push fetch nodes bench bench-endpoint test test-fast check clean

help:  ## this list, in the order of use
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 16

demo: $(TRAIN) $(SERVE)  ## the whole chain on this machine, small: no GPU, no model hub (10 to 25 minutes)
	@exec $(PY) -m chain recipes/demo.yaml $(IN_RUN) $(value ARGS)

setup: $(if $(WHEELHOUSE),,$(BASE) $(TRAIN) $(SERVE) $(DEV))  ## everything that the targets below need, into .venv (each target also does its own part by itself); without network: WHEELHOUSE=folder
	$(if $(WHEELHOUSE),@$(PYTHON) setup_venv.py wheelhouse)

wheelhouse: $(COLLECT)  ## what `make setup` needs on a machine without network, in one folder (docs/airgapped.md)
	@$(PY) setup_wheelhouse.py $(call quoted,$(or $(WHEELHOUSE),wheelhouse)) $(if $(PART),--part $(PART)) $(if $(EXCLUDE),--exclude $(EXCLUDE)) $(if $(MODELS),--model $(MODELS)) $(value ARGS)

serve: $(SERVE) $(NODES)  ## the recipe's teacher behind an OpenAI-compatible endpoint (ARGS="any vLLM flags"); MODEL=student: what it taught; CLUSTER=auto: on every node
	@exec $(PY) -m serve $(COMMON) $(ON_CLUSTER) $(if $(MODEL),--model $(call quoted,$(MODEL))) $(if $(value ARGS),--args='$(subst ','\'',$(value ARGS))')

generate: $(BASE) $(NODES)  ## ask the teacher; answers to completions.jsonl (TEACHER_URL=… TEACHER_MODEL=…); CLUSTER=auto: on a Ray cluster
	@exec $(PY) -m generate $(COMMON) $(ON_CLUSTER) $(value ARGS)

filter: $(BASE) $(NODES)  ## answers worth learning from to kept.jsonl, the others with their reasons to dropped.jsonl
	@exec $(PY) -m filters $(COMMON) $(ON_CLUSTER) $(value ARGS)

review: $(REVIEW)  ## judge a blind sample yourself on a local page; shows how far the filters agree (ARGS="--sample 100")
	@exec $(PY) -m filters.review $(COMMON) $(value ARGS)

train: $(TRAIN) $(NODES)  ## train the student on kept.jsonl; CLUSTER=auto: by all GPUs of a Ray cluster
	@exec $(PY) -m train $(COMMON) $(ON_CLUSTER) $(value ARGS)

evaluate: $(TRAIN) $(SERVE)  ## measure teacher, student before and student after: quality, speed, memory
	@exec $(PY) -m evaluate $(COMMON) $(value ARGS)

report: $(TRAIN)  ## write report.json and report.html again from what evaluate has measured
	@exec $(PY) -m evaluate $(COMMON) --report-only $(value ARGS)

check-run: $(BASE)  ## hold a run, at any stage, against the checklist of a good run (ARGS=--strict: unknown points fail too)
	@exec $(PY) -m evaluate.report.checklist $(COMMON) $(value ARGS)

chain: $(TRAIN) $(SERVE)  ## all stages of one recipe in turn: serve, generate, filter, train, evaluate
	@exec $(PY) -m chain $(COMMON) $(value ARGS)

experiment: $(TRAIN) $(SERVE)  ## compare trainings on one run: EXP=keep-rate|teachers|human|soft|seeds (docs/experiments.md)
	@exec $(PY) -m experiments $(or $(EXP),$(error experiment: give its name, EXP=keep-rate|teachers|human|soft|seeds)) $(COMMON) $(value ARGS)

chat: $(TRAIN) $(SERVE) $(REVIEW)  ## talk to teacher, student before and student after on a local page, or in the terminal (ARGS=--terminal)
	@exec $(PY) -m chat $(COMMON) $(value ARGS)

export: $(TRAIN)  ## the student with its card, into export/ (ARGS="--merged --dataset", or "--gguf q8_0" for llama.cpp and Ollama)
	@exec $(PY) -m train.publish.export $(COMMON) $(value ARGS)

push: $(TRAIN)  ## the same, to the Hub: REPO=owner/name, HF_TOKEN in the environment (ARGS="--merged --dataset")
	@exec $(PY) -m train.publish.export $(COMMON) --push $(call quoted,$(REPO)) $(value ARGS)

nodes: $(BASE)  ## a generation on a cluster, worker by worker: RUN=folder or s3://bucket/path (ARGS=--follow)
	@exec $(PY) -m scale.nodes $(call quoted,$(RECIPE)) $(IN_RUN) $(value ARGS)

fetch: $(BASE)  ## bring a run home from object storage: RUN=s3://bucket/path (TO=folder)
	@exec $(PY) -m scale.fetch $(call quoted,$(RUN)) $(if $(TO),$(call quoted,$(TO)))

bench: $(TRAIN) $(SERVE)  ## throughput of generation on this machine, against its limits (half an hour; docs/benchmarks.md)
	@$(PY) -m benchmarks.client && $(PY) -m benchmarks.simulated && $(PY) -m benchmarks.saturation && $(PY) -m benchmarks.chapter

bench-endpoint: $(BASE)  ## the recipe's endpoint at rising concurrency: tokens/s, time to first token, latency
	@exec $(PY) -m benchmarks.endpoint $(COMMON) $(value ARGS)

test: $(TRAIN) $(SERVE) $(DEV)  ## all tests; the slow ones run a real server and train a real student (about half an hour on two cores)
	@$(PYTEST) $(value ARGS)

test-fast: $(TRAIN) $(DEV)  ## the tests that need no real server or model
	@$(PYTEST) -m "not slow" $(value ARGS)

check: $(TRAIN) $(SERVE) $(DEV)  ## lint, format, types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

clean:  ## remove .venv and caches; never a run
	rm -rf .venv .venv.lock .mypy_cache .ruff_cache .pytest_cache build *.egg-info

.venv/.ready-%: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "set-up failed: no $(PYTHON) here; install Python 3.11 to 3.14, or name one: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) setup_venv.py $*
