"""What a teacher costs: the recipe's own price. Pure: reads and writes nothing."""

from typing import Literal, NamedTuple

from pipeline.recipe import TeacherConfig

PICO = 10**12  # pico-dollars in a dollar: prices a token are whole numbers of them
BATCH_SHARE = 2  # a batch costs half


class Price(NamedTuple):
    """Whole pico-dollars a token."""

    input: int
    output: int

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In pico-dollars."""
        return prompt_tokens * self.input + completion_tokens * self.output


def price_of(teacher: TeacherConfig, mode: Literal["online", "batch"] = "online") -> Price | None:
    """The price of the teacher's tokens; None where it is not known."""
    if teacher.price is None:
        return None
    share = BATCH_SHARE if mode == "batch" else 1
    return Price(round(teacher.price.input * 10**6) // share, round(teacher.price.output * 10**6) // share)
