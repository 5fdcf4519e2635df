"""The learning rate if the recipe gives none, by what is trained and by what the student was; and its warm-up."""

from math import ceil

from pipeline.recipe import Recipe
from pipeline.train_config import TrainConfig

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
    """Its share of the steps, rounded down: the first of them has a rate of 0, so a short training gets none."""
    return int(config.warmup * ceil(ceil(rows / config.batch_size) * epochs_of(config)))
