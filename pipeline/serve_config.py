"""The recipe's `serve` section."""

from typing import Literal

from pydantic import Field

from pipeline.section import Section


class ServeConfig(Section):
    """How `make serve` runs the teacher on this machine. None of it changes an answer."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    """Where vLLM runs; auto: on a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto: vLLM's choice on a GPU, what the hardware multiplies fast on a CPU."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """GiB of KV cache on a CPU; null: chosen from the free memory."""
    ready_timeout_s: float = Field(1800, gt=0)
    """Seconds until the server must be ready."""
    args: list[str] = Field([])
    """Further vLLM flags, a list item for each word. A student gets those that do not describe the teacher."""
