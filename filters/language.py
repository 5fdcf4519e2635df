"""The rule `language`: which language an answer is in, as py3langid says (installed only where wanted).

py3langid is the maintained form of langid.py (Lui and Baldwin 2012): naive Bayes over byte n-grams, 97 languages, a
model of 5 MB in the package, no network. About 1 ms an answer: a recipe asks for it, none does by default.
"""

import importlib
from functools import lru_cache
from typing import Any, Self

from pydantic import Field, model_validator

from filters.answer import Answer, TextSettings
from pipeline.records import Reason


class LanguageSettings(TextSettings):
    allowed: list[str] = Field(min_length=1)  # ISO 639-1 codes: [ko]
    min_probability: float = Field(0.0, ge=0, le=1)  # of the language found; a short or mixed text gets a low one

    @model_validator(mode="after")
    def _can_tell(self) -> Self:
        try:
            known = set(_identifier().labels)
        except ImportError:
            raise ValueError(
                "needs the package py3langid; install it with: .venv/bin/pip install -c constraints.txt py3langid"
            ) from None
        if unknown := [code for code in self.allowed if code not in known]:
            raise ValueError(f"allowed: no language {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return self


@lru_cache
def _identifier() -> Any:
    langid = importlib.import_module("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language(answer: Answer, settings: LanguageSettings) -> Reason | None:
    """Drops an answer in another language, or in one that is not certain enough."""
    found, probability = _identifier().classify(answer.text)
    probability = float(probability)
    if found not in settings.allowed:
        return Reason(rule="language", found=found, value=probability, allowed=settings.allowed)
    if probability < settings.min_probability:
        return Reason(rule="language", found=found, value=probability, at_least=settings.min_probability)
    return None
