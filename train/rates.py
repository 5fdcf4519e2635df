"""The learning rate if the recipe gives none, by what is trained and by what the student was; and its warm-up."""

from math import ceil

from pipeline.recipe import Recipe
from pipeline.train_config import TrainConfig

FULL_STEPS = ("gold", "on_policy")  # methods whose epochs leave out the rows of a last step that is not full
RATES = {
    "adapters": 2e-4,  # Dettmers et al. 2023, and TRL's scripts/sft.py
    "all weights of a pretrained student": 2e-5,  # TRL's scripts/sft.py
    "all weights of a new or pruned student": 1e-3,  # SmolLM2-135M and -360M's own fine-tuning; our pruned students
}


def with_learning_rate(recipe: Recipe) -> tuple[Recipe, str | None]:
    """The recipe with a learning rate, and the default that was used; None if the recipe gives its own."""
    if recipe.train.learning_rate is not None or recipe.train.further:  # which has a default of its own
        return recipe, None
    adapters, pretrained, made = RATES
    case = adapters
    if recipe.train.weights == "full":
        case = made if recipe.student and recipe.student.made else pretrained
    train = recipe.train.model_copy(update={"learning_rate": RATES[case]})
    return recipe.model_copy(update={"train": train}), case


def epochs_of(config: TrainConfig) -> float:
    """Passes over the rows, or over the pairs of preferences; further methods have their own number."""
    return {"dpo": config.dpo.epochs, "on_policy": config.on_policy.epochs}.get(config.method, config.epochs)


def warmup_steps(config: TrainConfig, rows: int) -> int:
    """Its share of the steps, rounded down: the first of them has a rate of 0, so a short training gets none.

    `rows` that are trained on. TRL's trainers for gold and on_policy leave out a step that is not full.
    """
    steps = rows / max(1, min(config.batch_size, rows))
    of_epoch = int(steps) if config.method in FULL_STEPS else ceil(steps)
    return int(config.warmup * ceil(of_epoch * epochs_of(config)))
