"""Soft distillation: the student follows the teacher's distribution over the vocabulary, on the same rows.

    kd    forward KL on the kept answers, mixed with cross-entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)
    gkd   generalised Jensen-Shannon divergence, in part on the student's own samples (Agarwal et al. 2024,
          https://arxiv.org/abs/2306.13649)

Loads the teacher from its folder, the Hub or the cache of embedded models; writes no file. Data order, checkpoints and
validation loss come from StudentTrainer: they are the same for hard and soft.
"""

import random
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.chat import stop_tokens
from pipeline.errors import DistillError, RecipeError, first_line
from pipeline.models import resolve_model
from pipeline.train_config import KdConfig
from train.machine import GIB, free_memory, native_bf16
from train.student_trainer import Batch, StudentTrainer, completion_logits
from train.teacher import known_files, parameters_of
from train.tokens import MASKED

# Samples are drawn from the student's distribution as it is, whatever its generation_config.json says.
AS_IT_IS: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def load_teacher(reference: str, student: Any, texts: Iterable[str], console: Console) -> Any:
    """Loads the teacher for inference, in bfloat16 where that is native, and says what it takes.

    `student`: the student's tokenizer. Raises RecipeError where only an API knows the teacher, or its tokens are not
    the student's, by its vocabulary or in one of `texts`; DistillError where memory is too small for it.
    """
    fix = "use train.method: lora or full, which learn from its text"
    try:
        folder, known = resolve_model(reference), known_files(reference)
        if known is None:
            raise RecipeError(f"soft distillation needs the teacher's weights, and {reference} has none here; {fix}")
        if difference := differing_tokens(AutoTokenizer.from_pretrained(known), student, texts):
            raise RecipeError(f"soft distillation needs one tokenizer, and {reference} {difference}; {fix}")
        dtype = torch.bfloat16 if native_bf16() else torch.float32
        size, free = (parameters_of(known, reference) or 0) * dtype.itemsize, free_memory()
        memory = f"the teacher {reference} takes {size / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}"
        if size > free:
            raise DistillError(f"{memory}, {free / GIB:.1f} GiB are free; {fix}")
        console.print(memory)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise RecipeError(f"teacher.model: cannot load {reference}: {first_line(error)}; {fix}") from None


def differing_tokens(teacher: Any, student: Any, texts: Iterable[str]) -> str:
    """How the teacher's tokenizer differs from the student's; empty if both make the same ids of everything."""
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        differing = len({*own.items()} ^ {*other.items()})
        return f"has another vocabulary than the student ({differing:,} tokens or ids are not shared)"
    for text in texts:
        if student(text)["input_ids"] != teacher(text)["input_ids"]:
            return f"splits text into other tokens than the student: {text[:40]!r}"
    return ""


class KdTrainer(StudentTrainer):
    """Minimises alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy on the kept answers.

    The factor T^2 keeps the gradients of the two in proportion when the temperature changes (Hinton et al. 2015).
    """

    def __init__(self, *, teacher: Any, soft: KdConfig, **settings: Any) -> None:
        super().__init__(**settings)
        self.aux_loss_enabled = False  # a mixture of experts follows the teacher, without the router's loss
        self.soft, self.teacher = soft, teacher.to(self.args.device)
        outputs = teacher.config.get_text_config().vocab_size  # makers pad them as they like
        self.vocabulary = min(len(self.processing_class), outputs)  # the ids that both know: the first of their logits

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor, inputs: Batch) -> torch.Tensor:
        alpha = self.soft.alpha
        hard = cross_entropy(logits.float(), targets, reduction="sum") if alpha < 1 else 0
        return alpha * self.soft.temperature**2 * self.divergence(logits, inputs, beta=0) + (1 - alpha) * hard

    def divergence(self, logits: torch.Tensor, inputs: Batch, *, beta: float) -> torch.Tensor:
        """From the teacher over the shared vocabulary, summed over the completion tokens, in nats."""
        from trl.experimental.gkd import GKDTrainer  # warns when it is imported; trainers run with warnings muted

        with torch.no_grad():
            other, _, _ = completion_logits(self.teacher, inputs)
        own, other = (either[:, : self.vocabulary].float() for either in (logits, other))
        temperature = self.soft.temperature
        return GKDTrainer.generalized_jsd_loss(own, other, beta=beta, temperature=temperature, reduction="sum")


class GkdTrainer(KdTrainer):
    """Minimises the divergence on the kept answers, and in a share of the steps on the student's own samples.

    A sample answers a kept prompt, is drawn from the student as it is (temperature 1), and ends with a stop token or
    at max_new_tokens. No gradient flows through the drawing.
    """

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        # Decided by the step's number, so that a resumed training makes the same choices.
        if random.Random(f"{self.args.seed} {self.state.global_step}").random() < self.soft.lmbda:
            inputs = self.sampled(model, self._prepare_inputs(inputs))
            tokens = (inputs["labels"] != MASKED).sum()
            num_items_in_batch = self.accelerator.reduce(tokens, reduction="sum")
        return super().training_step(model, inputs, num_items_in_batch)

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor, inputs: Batch) -> torch.Tensor:
        return self.divergence(logits, inputs, beta=self.soft.beta)

    def sampled(self, model: Any, inputs: Batch) -> Batch:
        """The batch with its answers replaced by the student's own."""
        student = self.accelerator.unwrap_model(model)
        lengths = (inputs["labels"] != MASKED).int().argmax(dim=1).tolist()  # of the prompts
        prompts = [ids[:length].tolist() for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
        asked = self.processing_class.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        stops = sorted(stop_tokens(self.processing_class, student))
        student.eval()
        with torch.no_grad(), self.accelerator.autocast():
            drawn = student.generate(
                **asked.to(self.args.device),
                **AS_IT_IS,
                max_new_tokens=self.soft.max_new_tokens,
                eos_token_id=stops,
                pad_token_id=self.processing_class.pad_token_id,
            )[:, asked["input_ids"].shape[1] :]
        student.train()
        rows = []
        for prompt, sample in zip(prompts, drawn.tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(sample) if token in stops), len(sample))
            rows.append({"input_ids": prompt + sample[:end], "labels": [MASKED] * len(prompt) + sample[:end]})
        return self._prepare_inputs(self.data_collator(rows))
