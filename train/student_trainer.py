"""TRL's SFTTrainer with a data order that survives a resume, little padding, and one validation loss for all methods.

Takes a model and tokenised rows. train.trainer decides what the rows are and what becomes of the model.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from pipeline.errors import RecipeError
from train.batches import StepLoader, StepSampler, end_to_end, micro_batches, split
from train.tokens import MASKED, Batch

PROBE = 16  # tokens of each of the two rows that show whether a model keeps rows apart
ROUNDING = 0.01  # of the largest logit: what kernels that sum in another order may change; 16 bits round to 0.004

# Summed over the completion tokens; how many those are; the loss of a router, if any.
Loss = tuple[torch.Tensor, torch.Tensor | int, torch.Tensor | None]


class ScoredOnText:
    """A trainer whose validation loss is the cross-entropy of the validation answers: one figure for all methods.

    `eval_dataset` has the columns `input_ids` and `labels`; `collate` makes a batch of its rows, `micro` says how many
    tokens and rows at most.
    """

    micro: dict[str, Any]
    collate: Callable[[list[Any]], Batch]

    def evaluate(self: Any, *given: Any, metric_key_prefix: str = "eval", **more: Any) -> dict[str, float]:
        """Cross-entropy per completion token of the validation rows; all tokens weigh the same."""
        rows = self.eval_dataset.select_columns(["input_ids", "labels"])
        groups = micro_batches([len(ids) for ids in rows["input_ids"]], **self.micro)
        sums = torch.zeros(2, dtype=torch.float64)
        training = self.model.training
        self.model.eval()
        for start in range(0, len(groups), self.args.world_size):
            own = start + self.args.process_index  # with FSDP all make the same number of passes; too many count zero
            group, counts = (groups[own], 1) if own < len(groups) else (groups[-1], 0)
            batch = self.collate([rows[index] for index in group])
            inputs = {name: value.to(self.args.device) for name, value in batch.items()}
            with torch.no_grad(), self.accelerator.autocast():
                loss, tokens, _ = text_loss(self.model, inputs)
            sums += counts * torch.tensor([float(loss), int(tokens)], dtype=torch.float64)
        summed, count = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        metrics: dict[str, float] = {f"{metric_key_prefix}_loss": summed / count}
        self.log(metrics)
        self.model.train(training)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StudentTrainer(ScoredOnText, SFTTrainer):
    """One batch of the loader holds all rows of a step in this process. They pass the student in micro-batches.

    `step_rows`: rows per step, over all processes. `micro_tokens`, `micro_rows`: at most so many per forward pass.
    `padding_free`: the rows of a forward pass lie end to end, which FlashAttention understands; the first step raises
    RecipeError if the model mixes them.
    """

    def __init__(
        self,
        *,
        step_rows: int,
        micro_tokens: int,
        micro_rows: int | None = None,
        padding_free: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.step_rows, self.collate, self.end_to_end = step_rows, self.data_collator, padding_free
        self.micro: dict[str, Any] = {"tokens": micro_tokens, "rows": micro_rows}
        self.model_accepts_loss_kwargs = True  # a step's tokens are counted, also where a model's own loss does not ask
        self.apart = False  # whether the model was seen to keep rows apart that lie end to end

    def get_train_dataloader(self) -> StepLoader:
        rows = self._remove_unused_columns(self.train_dataset, description="training")
        lengths, args = [len(ids) for ids in rows["input_ids"]], self.args
        place = {"rank": args.process_index, "processes": args.world_size}
        sampler = StepSampler(lengths, self.step_rows, seed=args.seed, **place)
        return StepLoader(
            rows, batch_sampler=sampler, collate_fn=self.data_collator, pin_memory=args.dataloader_pin_memory
        )

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a step. Processes exchange gradients once, in the last micro-batch.

        With FSDP they exchange weights and gradients in each pass, so all make the same number of passes: one with
        fewer micro-batches repeats its last, at a loss of zero.
        """
        if self.end_to_end and not self.apart:
            model.eval()
            with torch.no_grad(), self.accelerator.autocast():
                check_rows_apart(self.model, self.args.device)
            self.apart = True
        parts = split(self._prepare_inputs(inputs), **self.micro, multiple=self.args.pad_to_multiple_of or 1)
        parts = [end_to_end(part) for part in parts] if self.end_to_end else parts
        passes = [(part, num_items_in_batch) for part in parts]
        if self.is_fsdp_enabled:
            most = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device)).max()
            passes += [(parts[-1], math.inf)] * (int(most) - len(parts))  # a loss per token of so many is zero
        losses = []
        for number, (part, tokens) in enumerate(passes, 1):
            alone = number < len(passes) and not self.is_fsdp_enabled
            with self.accelerator.no_sync(model) if alone else nullcontext():
                losses.append(super().training_step(model, part, tokens))
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's part of the step's loss: a mean per completion token, over all processes.

        The router's loss of a mixture of experts is a mean already, so it is weighted by the tokens.
        """
        loss, tokens, router_loss = self.summed_loss(model, inputs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * router_loss * tokens
        return loss * self.accelerator.num_processes / num_items_in_batch  # processes: DDP averages

    def summed_loss(self, model: Any, inputs: Batch) -> Loss:
        """What is minimised, summed over the completion tokens."""
        return text_loss(model, inputs)


def check_rows_apart(model: Any, device: torch.device) -> None:
    """Raises RecipeError if what the model says of a row depends on the row before it in the same pass.

    Attention tells rows by their places. Other layers of hybrid models (convolutions, linear attention, Mamba) do not.
    Two rows pass in both orders: the shapes are the same, those of a mixture's experts too, so a model that keeps rows
    apart computes the same numbers.
    """
    rows = torch.arange(2 * PROBE, device=device).view(2, PROBE)
    positions = torch.arange(PROBE, device=device).repeat(2)[None]
    one, other = (
        model(input_ids=order.reshape(1, -1), position_ids=positions, use_cache=False).logits[0].float()
        for order in (rows, rows.flip(0))
    )
    if (one - other.roll(PROBE, 0)).abs().max() > ROUNDING * one.abs().max():
        raise RecipeError(
            "train.padding_free true: layers of this student that are no attention (convolutions, linear attention, "
            "Mamba) would read on from one row into the next; leave it out"
        )


def has_fused_head(device: torch.device) -> bool:
    """Whether to use TRL's fused head, which SFTTrainer gives every student: it makes logits in tiles and keeps none.

    Its kernels are Triton's, for GPUs. On a CPU it would compute logits for prompts too.
    """
    return device.type == "cuda"


def text_loss(model: Any, inputs: Batch) -> Loss:
    """Cross-entropy in nats, summed over the completion tokens."""
    if has_fused_head(inputs["input_ids"].device):
        given = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], **places(model, inputs)}
        output = model(**given, fused_lm_head=True)
        return -output.log_probs.sum(), output.label_mask.sum(), output.aux_loss
    logits, targets, router_loss = completion_logits(model, inputs)
    return cross_entropy(logits.float(), targets, reduction="sum"), len(targets), router_loss


def places(model: Any, inputs: Batch) -> Batch:
    """What the model has to be told of the places of a batch's tokens.

    Of rows end to end, each token's place in its row. Of rows padded on the right nothing: causal attention never looks
    at what follows, and without a mask it has faster kernels. Only a router's loss would count the padding.
    """
    if "position_ids" in inputs:
        return {"position_ids": inputs["position_ids"]}
    shape = getattr(model, "module", model).config.get_text_config()  # DDP has the model in `module`
    return {"attention_mask": inputs["attention_mask"]} if hasattr(shape, "output_router_logits") else {}


def completion_logits(
    model: Any, inputs: Batch, start: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits (tokens, vocabulary) where a completion token is predicted, those tokens, and the loss of a router if any.

    A mixture of experts has a router; its loss says how unevenly the experts are used. The output head is applied from
    the first such position on. Over a vocabulary of 50,000 to 150,000 it costs a small model as much as its layers, and
    its logits for prompts are not used. `start`: keys and values of what comes before the inputs.
    """
    learned = inputs["labels"] != MASKED
    first = int(learned.any(dim=0).nonzero()[0])
    positions = torch.arange(first - 1, learned.shape[1] - 1, device=learned.device)
    masked = {} if start is None else {"attention_mask": inputs["attention_mask"]}  # it has the places of `start` too
    output = model(
        input_ids=inputs["input_ids"],
        **(places(model, inputs) | masked),
        logits_to_keep=positions,
        past_key_values=start,
        use_cache=start is not None,
    )
    return output.logits[learned[:, first:]], inputs["labels"][learned], getattr(output, "aux_loss", None)
