"""The verifier `sql`: the answer is a query that runs on a SQLite database, and finds what the reference finds."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, ValidationInfo, model_validator

from filters.answer import Answer, Verified
from filters.verify.extract import ReferenceSettings, beside_recipe, fenced_block, shown
from filters.verify.guard import Unverified
from filters.verify.worker import call
from pipeline.records import Reason

_DATABASE = "filters.verify.database"


class SqlSettings(ReferenceSettings):
    database: Path = Field(description="a SQLite file, or a .sql script that makes one; beside the recipe")
    reference: bool | None = Field(None, description="compare with the reference's result; none: if the row has one")
    returns_rows: bool = Field(False, description="an answer that finds nothing is dropped")
    tolerance: float | None = Field(None, ge=0)  # of numbers, as a share of the reference's; none: as `matches`
    seconds: float = Field(2, gt=0)  # of processor time, for each query
    _file: str = PrivateAttr()

    @model_validator(mode="after")
    def _can_be_read(self, info: ValidationInfo) -> Self:
        path = beside_recipe(self.database, info).resolve()
        self._file = str(path)
        log = Path(f"{path}-wal")
        if log.exists() and log.stat().st_size:
            raise ValueError(f"database: {log} holds changes that are not in it yet; close the program that uses it")
        try:
            self.check("SELECT 1", None)
        except Unverified as error:
            raise ValueError(f"database: {path}: {error}") from None
        return self

    def check(self, query: str, reference: str | None) -> dict[str, Any]:
        """What `filters.verify.database.check` says of two queries. The time is for both, on a busy machine."""
        arguments = self._file, query, reference, self.seconds, self.tolerance
        found: dict[str, Any] = call(
            _DATABASE, "check", *arguments, seconds=4 * self.seconds + 2, load=("load", self._file)
        )
        return found


def sql(answer: Answer, settings: SqlSettings) -> Verified:
    """Drops an answer that does not run, or finds something else than the reference. `result` is what it finds."""
    compare = settings.reference if settings.reference is not None else answer.reference is not None
    reference = settings.reference_of(answer) if compare else None
    if reference is not None and not isinstance(reference, str):
        raise Unverified(f"the reference is not SQL: {shown(str(reference))}")
    query = fenced_block(answer.text, "sql", "sqlite")
    found = settings.check(query, reference)
    if found["what"]:
        return Verified(Reason(rule="sql", what=found["what"], found=shown(found["note"])))
    result = found["result"]
    if found["same"] is False:
        reason = Reason(rule="sql", what="result", value=found["rows"], total=found["wanted_rows"], found=shown(query))
        return Verified(reason, result=result)
    if settings.returns_rows and not found["rows"]:
        return Verified(Reason(rule="sql", what="rows", found=shown(query)), result=result)
    return Verified(result=result)
