"""TRL's SFTTrainer with a data order that survives a resume, little padding, and one validation loss for all methods.

Takes a model and tokenised rows; what the rows are and what becomes of the model is train.trainer's business.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from train.batches import StepLoader, StepSampler, micro_batches, split
from train.tokens import MASKED

Batch = dict[str, torch.Tensor]


class StudentTrainer(SFTTrainer):
    """One batch of the loader is all rows of a step in this process; it goes through the student in micro-batches.

    `step_rows`: rows of a step, over all processes. `micro_tokens`, `micro_rows`: of one forward pass, at most.
    """

    def __init__(self, *, step_rows: int, micro_tokens: int, micro_rows: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.step_rows = step_rows
        self.micro: dict[str, Any] = {"tokens": micro_tokens, "rows": micro_rows}

    def get_train_dataloader(self) -> StepLoader:
        rows = self._remove_unused_columns(self.train_dataset, description="training")
        sampler = StepSampler(
            [len(ids) for ids in rows["input_ids"]],
            self.step_rows,
            seed=self.args.seed,
            rank=self.args.process_index,
            processes=self.args.world_size,
        )
        pin = self.args.dataloader_pin_memory
        return StepLoader(rows, batch_sampler=sampler, collate_fn=self.data_collator, pin_memory=pin)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a step; processes exchange gradients once, in its last micro-batch."""
        parts = split(self._prepare_inputs(inputs), **self.micro)
        losses = []
        for part in parts:
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean loss a completion token of the step, over all processes and micro-batches: this one's part of it."""
        if self.aux_loss_enabled:  # a mixture of experts has a loss of its router too
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        logits, targets = completion_logits(model, inputs)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return self.loss_of(logits, targets, inputs) * processes / num_items_in_batch  # processes: DDP averages

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor, inputs: Batch) -> torch.Tensor:
        """The sum over completion tokens of what is minimised: cross-entropy, in nats."""
        return cross_entropy(logits.float(), targets, reduction="sum")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Cross-entropy per completion token of the validation rows; all tokens weigh the same, for every method."""
        rows = self._remove_unused_columns(self.eval_dataset, description="evaluation")
        groups = micro_batches([len(ids) for ids in rows["input_ids"]], **self.micro)
        sums = torch.zeros(2, dtype=torch.float64)
        training = self.model.training
        self.model.eval()
        for group in groups[self.args.process_index :: self.args.world_size]:
            inputs = self._prepare_inputs(self.data_collator([rows[index] for index in group]))
            with torch.no_grad(), self.accelerator.autocast():
                logits, targets = completion_logits(self.model, inputs)
                loss = cross_entropy(logits.float(), targets, reduction="sum")
            sums += torch.tensor([loss.item(), len(targets)], dtype=torch.float64)
        loss, tokens = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        self.log(metrics)
        self.model.train(training)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def completion_logits(model: Any, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens, vocabulary) at the places that predict a completion token, and those tokens (tokens,).

    The output head is applied from the first such place on: over a vocabulary of 50,000 to 150,000 it costs a small
    model as much as its layers do, and what it says of prompts is not used.
    """
    learned = inputs["labels"] != MASKED
    first = int(learned.any(dim=0).nonzero()[0])
    places = torch.arange(first - 1, learned.shape[1] - 1, device=learned.device)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_to_keep=places,
        use_cache=False,
    ).logits
    return logits[learned[:, first:]], inputs["labels"][learned]
