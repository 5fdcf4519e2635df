"""Merges an adapter into its base: an ordinary model, which engines serve and users can be given."""

from pathlib import Path

from pipeline.errors import UsageError, first_line

ADAPTER = "adapter_config.json"  # in the folder of an adapter, and in no other
MERGED_FROM = "merged_from.json"  # in a merged folder of a run: the base and adapter that it was made of


def merge_adapter(base: str | Path, adapter: Path, target: Path) -> None:
    """Adds the adapter to the base in float32 and saves the sum in the base's dtype, with the adapter's tokenizer.

    Raises UsageError if the base cannot be loaded.
    """
    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"the base {base} cannot be loaded: {first_line(error)}") from None
    PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(target)
