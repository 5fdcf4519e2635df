"""Soft distillation on the kept answers: the student follows the teacher's distribution over the vocabulary.

    kd    forward KL, mixed with cross-entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)

Loads the teacher from its folder, the Hub or the cache of embedded models; writes no file. Data order, checkpoints and
validation loss come from StudentTrainer: they are the same for hard and soft. TRL's stable trainer draws its answers
itself, and its GOLD trainer computes logits for prompts and padding too: tests/train/test_soft.py shows both.
"""

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pipeline.errors import DistillError
from pipeline.models import explained, resolve_model
from pipeline.resources import GIB, half_dtype
from pipeline.train_config import KdConfig
from train.machine import free_memory
from train.student_trainer import Loss, StudentTrainer, completion_logits
from train.teacher import FIX, check_same_tokens, followed_files, parameters_of
from train.tokens import Batch, key_of
from train.told import TeacherPrompts
from train.top_k import TopK


def load_teacher(reference: str, student: Any, texts: Iterable[str], console: Console) -> Any:
    """Loads a teacher of the student's tokenizer. As load_model; `student`: the student's tokenizer.

    Raises RecipeError, too, if the teacher's tokens are not the student's.
    """
    check_same_tokens(reference, student, texts)
    return load_model(reference, console)


def load_model(reference: str, console: Console) -> Any:
    """Loads the teacher for inference, in 16 bits where those are native, and says what it takes.

    Raises RecipeError where only an API knows the teacher; DistillError where memory is too small for it.
    """
    known = followed_files(reference)
    with explained(f"teacher.model: cannot load {reference} ({FIX})"):
        folder = resolve_model(reference)
        dtype = half_dtype() or torch.float32
        size, free = (parameters_of(known, reference) or 0) * dtype.itemsize, free_memory()
        memory = f"the teacher {reference} takes {size / GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}"
        if size > free:
            raise DistillError(f"{memory}, {free / GIB:.1f} GiB are free; {FIX}")
        console.print(memory)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


class SoftTrainer(StudentTrainer):
    """Minimises alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy on the kept answers.

    The factor T^2 keeps the gradients of the two in proportion when the temperature changes (Hinton et al. 2015).
    """

    def __init__(self, *, soft: KdConfig, **settings: Any) -> None:
        super().__init__(**settings)
        self.aux_loss_enabled = False  # a mixture of experts follows the teacher, without the router's loss
        self.soft = soft

    def summed_loss(self, model: Any, inputs: Batch) -> Loss:
        alpha = self.soft.alpha
        logits, targets, _ = completion_logits(model, inputs)
        hard = cross_entropy(logits.float(), targets, reduction="sum") if alpha < 1 else 0
        soft = alpha * self.soft.temperature**2 * self.divergence(logits, inputs)
        return soft + (1 - alpha) * hard, len(targets), None

    def divergence(self, logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """KL from the teacher, summed over the completion tokens, in nats."""
        raise NotImplementedError


class KdTrainer(SoftTrainer):
    """With the teacher beside the student: the divergence is over their shared vocabulary."""

    teacher_prompts: TeacherPrompts  # set before training

    def __init__(self, *, teacher: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = teacher.to(self.args.device)
        outputs = teacher.config.get_text_config().vocab_size  # makers pad them as they like
        self.vocabulary = min(len(self.processing_class), outputs)  # the ids that both know: the first of their logits

    def divergence(self, logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
        from trl.experimental.gkd import GKDTrainer  # warns when it is imported; trainers run with warnings muted

        with torch.no_grad():
            told = self.teacher_prompts.in_batch(inputs, self.processing_class.pad_token_id)
            start = self.teacher_prompts.start_states(self.teacher, len(told["labels"]))
            other, _, _ = completion_logits(self.teacher, told, start)
        own, other = (either[:, : self.vocabulary].float() for either in (logits, other))
        temperature = self.soft.temperature
        return GKDTrainer.generalized_jsd_loss(own, other, beta=0, temperature=temperature, reduction="sum")


class TopKTrainer(SoftTrainer):
    """At temperature 1, where only the teacher's likeliest tokens are known: of an endpoint, or stored.

    All other tokens are one more outcome, with the rest of the probability. Tokens without any teacher's word learn
    from the text alone, with their part of the weight.
    """

    known: TopK  # by the tokens of a row (train.tokens.key_of); set before training

    def divergence(self, logits: torch.Tensor, inputs: Batch) -> torch.Tensor:
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(dim=1).tolist(), strict=True)
        found = [self.known[key_of(ids[:length])] for ids, length in rows]
        likeliest, logprobs = (torch.cat([torch.from_numpy(row[part]) for row in found]) for part in (0, 1))
        return top_k_divergence(logits, likeliest.to(logits.device), logprobs.to(logits.device))


def top_k_divergence(logits: torch.Tensor, likeliest: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL from the teacher, summed over the tokens, in nats, by TRL's functions for a teacher behind a server.

    `logits` (tokens, vocabulary) of the student; `likeliest` (tokens, k), the teacher's ids, and their `logprobs`. An
    id that the student has no logit for, as -1, counts with the rest.
    """
    from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

    valid = (likeliest >= 0) & (likeliest < logits.shape[-1])
    told = valid.any(dim=-1)
    valid, ids = valid[told], likeliest[told].long()
    own = logits[told].float().log_softmax(dim=-1).gather(-1, ids.where(valid, 0))
    no = torch.tensor(-torch.inf, device=logits.device)
    student, support = _add_tail_bucket(own.where(valid, no), valid)
    teacher, _ = _add_tail_bucket(logprobs[told].float().where(valid, no), valid)
    return _jsd_divergence(student, teacher, beta=0, support_mask=support).sum()
