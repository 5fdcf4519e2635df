"""The reasoning of a model that writes it into its text, told apart from the answer."""

import pytest

from pipeline.reasoning import split_reasoning


@pytest.mark.parametrize(
    ("said", "reasoning", "answer"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
        ("\n <think>hm</think>Four. ", "hm", "Four. "),
        ("<think>\n\n</think>\n\nFour.", "", "Four."),  # a model that was told not to think
        ("Two and two.\n</think>\n\nFour.", "Two and two.", "Four."),  # the template opened it
        ("</think>Four.", "", "Four."),
        ("<think>Two and", "Two and", ""),  # cut off
        ("<think>a</think>b</think>c", "a", "b</think>c"),  # the first end counts
        ("Four.", "", "Four."),
        (" Four.\n", "", " Four.\n"),  # not a character is changed
        ("", "", ""),
        ("Write <think>so</think> to think.", "", "Write <think>so</think> to think."),  # talks of it
        ("I <think> so", "", "I <think> so"),
        ("<thought>**Plan**\nhm</thought>Four.", "**Plan**\nhm", "Four."),
        ("Two and two.\n</thought>\n\nFour.", "Two and two.", "Four."),
        ("[THINK]hm[/THINK]Four.", "hm", "Four."),
        ("<|channel>thought\nhm\n<channel|>Four.", "hm", "Four."),
        ("<|channel>thought\nhm", "hm", ""),
        ("<think>a </thought> b</think>Four.", "a </thought> b", "Four."),
        ("[THINK]a </think> b[/THINK]Four.", "a </think> b", "Four."),
        ("<thought>a </think> b</thought>Four.", "a </think> b", "Four."),
        ("Split it at [/THINK].", "", "Split it at [/THINK]."),  # no template opens it
        ("Split it at <channel|>.", "", "Split it at <channel|>."),
        ("Magistral writes [THINK]so[/THINK].", "", "Magistral writes [THINK]so[/THINK]."),
    ],
)
def test_reasoning_is_what_stands_before_the_answer(said: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(said) == (reasoning, answer)
