"""On-policy distillation by TRL's DistillationTrainer, or its ServerDistillationTrainer where the teacher is served.

The student answers the training prompts, and follows the teacher's distribution on its own answers (Agarwal et al.,
https://arxiv.org/abs/2306.13649). Takes a student that learned from answers, and rows as StudentTrainer tokenised them.
Ours are the prompts' tokens, which are those of the other methods, an order that survives a resume, and the
validation loss; tests/train/test_on_policy.py shows what TRL's own do in their place.
"""

from typing import Any

from rich.console import Console
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import RepeatSampler

from pipeline.errors import RecipeError
from pipeline.teacher_config import TeacherConfig
from pipeline.train_config import TrainConfig
from train.machine import free_beside, micro_rows, micro_tokens
from train.setting import Setting
from train.soft import load_teacher
from train.student_trainer import ScoredOnText, StudentTrainer
from train.teacher import FIX
from train.tokens import prompt_of
from train.told import TeacherPrompts, Told, reads_over_gaps
from train.top_k import COMPARED_ROWS, check_tokens, endpoint_client


class EpochSampler(RepeatSampler):
    """TRL's order of rows, except that it depends on the seed and the epoch alone: it is the same after a resume."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)


class SameEveryEpoch:
    """A trainer of TRL's whose rows come in the order of an EpochSampler."""

    def _get_train_sampler(self: Any, dataset: Any = None) -> EpochSampler:
        theirs = super()._get_train_sampler(dataset)  # type: ignore[misc]
        own = EpochSampler.__new__(EpochSampler)
        own.__dict__.update(theirs.__dict__)
        return own


class OnPolicyTrainer(ScoredOnText, SameEveryEpoch, DistillationTrainer):
    """DistillationTrainer with a student and rows as the other methods have them; `prompt` of a row: its tokens."""

    def __init__(self, *, tokenised: StudentTrainer, told: Told, **settings: Any) -> None:
        self.micro, self.collate = tokenised.micro, tokenised.collate
        prompts = [prompt_of(row) for row in tokenised.train_dataset]
        teacher = settings.get("teacher_model")  # None: it is asked at its endpoint
        self.teacher_prompts = TeacherPrompts(told, prompts, shared=teacher is not None and reads_over_gaps(teacher))
        DistillationTrainer.__init__(
            self,
            model=tokenised.model,
            train_dataset=tokenised.train_dataset.select_columns(["input_ids", "labels"]).add_column("prompt", prompts),
            eval_dataset=tokenised.eval_dataset,
            processing_class=tokenised.processing_class,
            **settings,
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _get_last_hidden_state(
        self, unwrapped_model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, **more: Any
    ) -> Any:
        prompts = self.teacher_prompts
        if prompts.told and unwrapped_model is self.accelerator.unwrap_model(self.teacher_model):
            pad = self.processing_class.pad_token_id
            ids, mask = prompts.before_samples(input_ids, attention_mask, logits_to_keep, pad)
            places = mask.cumsum(dim=1)[:, len(prompts.start) :] - 1
            states = prompts.start_states(unwrapped_model, len(ids))
            output = unwrapped_model.base_model(
                input_ids=ids, attention_mask=mask, position_ids=places.clamp(min=0), past_key_values=states
            )
            return output.last_hidden_state[:, -logits_to_keep - 1 : -1]
        return super()._get_last_hidden_state(unwrapped_model, input_ids, attention_mask, logits_to_keep, **more)


def on_policy_trainer(
    tokenised: StudentTrainer, arguments: dict[str, Any], told: Told, setting: Setting
) -> OnPolicyTrainer:
    """The trainer of the recipe. `tokenised` has the student and the rows; `told`: the teacher's own prompts.

    Raises RecipeError or DistillError if the teacher cannot be had, or its tokens are not the student's.
    """
    config, own, model, teacher = setting.config, setting.config.on_policy, tokenised.model, setting.teacher
    assert teacher is not None
    shape, beside = model.config.get_text_config(), list[Any]()
    if hasattr(shape, "output_router_logits"):
        shape.output_router_logits = False  # its loss has no part here, and drawing answers would fail at it
    if config.kd.teacher != "served":
        compared = tokenised.train_dataset.select(range(min(len(tokenised.train_dataset), COMPARED_ROWS)))
        texts = [tokenised.processing_class.decode(row["input_ids"]) for row in compared]
        beside = [
            load_same_outputs(teacher.model, tokenised.processing_class, texts, shape.vocab_size, setting.console)
        ]
    longest = max(len(prompt_of(row)) for row in tokenised.train_dataset) + own.max_new_tokens
    tokens = micro_tokens(model, config, free_beside(model, *beside))
    micro, passes = micro_rows(config, len(tokenised.train_dataset), tokens, longest, setting.processes)
    settings = {name: value for name, value in arguments.items() if name != "max_length"} | {
        "learning_rate": own.learning_rate,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": passes,
        "beta": own.beta,
        "temperature": config.kd.temperature,
        "max_completion_length": own.max_new_tokens,
        "use_vllm": own.rollouts == "vllm",
        "include_num_input_tokens_seen": "no",  # TRL counts the samples itself
    }
    if not beside:
        return _served(tokenised, settings, config, teacher, told)
    args = DistillationConfig(**settings)
    return OnPolicyTrainer(tokenised=tokenised, told=told, teacher_model=beside[0], args=args)


def load_same_outputs(reference: str, tokenizer: Any, texts: list[str], outputs: int, console: Console) -> Any:
    """A teacher with as many outputs as the student: makers pad the same vocabulary to different sizes."""
    teacher = load_teacher(reference, tokenizer, texts, console)
    if (own := teacher.config.get_text_config().vocab_size) < outputs:
        raise RecipeError(f"on_policy: {reference} has {own:,} outputs, the student {outputs:,}; {FIX}, or kd")
    if own > outputs:
        teacher.resize_token_embeddings(outputs)
    return teacher


def _served(
    tokenised: StudentTrainer, settings: dict[str, Any], config: TrainConfig, teacher: TeacherConfig, told: Told
) -> OnPolicyTrainer:
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    class ServedTrainer(OnPolicyTrainer, ServerDistillationTrainer):
        """TRL's trainer with a client that may need a key; its own constructor makes one that sends none."""

        def __init__(self, *, client: Any, args: ServerDistillationConfig, **rest: Any) -> None:
            self.teacher_client, self.loss_top_k, self.loss_add_tail = client, args.loss_top_k, args.loss_add_tail
            self.reverse_kl_top_1_mode = args.reverse_kl_top_1_mode
            OnPolicyTrainer.__init__(self, args=args, **rest)

        def _get_teacher_token_logprobs_from_server(self, inputs: Any, aligned_prompt_length: int) -> Any:
            said = super()._get_teacher_token_logprobs_from_server(inputs, aligned_prompt_length)
            ids, logprobs = said["topk_token_ids"], said["topk_logprobs"]
            known = ids < self.model.config.get_text_config().vocab_size  # the teacher's outputs may be padded further
            none = float("-inf")
            return said | {"topk_token_ids": ids.where(known, 0), "topk_logprobs": logprobs.where(known, none)}

    client = endpoint_client(teacher, told)
    check_tokens(client, [*tokenised.train_dataset][:COMPARED_ROWS], tokenised.processing_class)
    args = ServerDistillationConfig(
        **settings,
        teacher_model_server_url=client.base_url,
        loss_top_k=config.kd.top_k if settings["beta"] == 0 else 1,  # TRL knows no other with a reverse part
    )
    return ServedTrainer(tokenised=tokenised, told=told, client=client, args=args)
