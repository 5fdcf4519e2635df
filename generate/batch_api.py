"""The provider's side of a batch: files and batches at the endpoint, with the `openai` package.

HTTP only: what a batch means for a run is in generate.batch. Every message from here has its secrets hidden.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
from openai.types import Batch

from generate.batch_files import ENDED
from generate.client import headers_of, words_of
from generate.endpoint import TIMEOUT_S
from pipeline.address import proxy_of
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.rundir import replacing

LISTED = 100  # batches per page, when one is looked for


class BatchApi:
    """One endpoint's Files and Batches, while its `client` is open. The methods raise openai.APIError."""

    def __init__(self, recipe: Recipe, run_key: str) -> None:
        """`run_key` marks this run's batches at the provider."""
        teacher, key = recipe.teacher, recipe.teacher.api_key()
        self.url, self._run_key, self.words = teacher.url, run_key, words_of(teacher)
        self.key = f"{teacher.api_key_env} is not set, or holds a key that it refuses"  # if it refuses the key
        self._section = teacher.section
        headers = headers_of(teacher)
        del headers["Content-Type"]  # which the package sets
        self.client = openai.AsyncOpenAI(
            api_key=key.get_secret_value() if key else "none",
            base_url=teacher.url,
            default_headers=headers,
            default_query=dict(teacher.query),
            http_client=openai.DefaultAsyncHttpxClient(  # proxy and certificates as in generate.client
                proxy=proxy_of(teacher.url), verify=ssl.create_default_context(), trust_env=False
            ),
            max_retries=0,  # a request that may have arrived is not sent again without looking
            timeout=recipe.generate.request_timeout_s or TIMEOUT_S,
        )

    async def upload(self, path: Path) -> str:
        with path.open("rb") as file, self._answers_json("files"):
            return (await self.client.files.create(file=file, purpose="batch")).id

    async def find(self, chunk: str, file_id: str) -> Batch | None:
        """The batch of a chunk's file, if one was created whose creation this run never heard of.

        A copy of the run has the same key and numbers its chunks alike: the file tells their batches apart.
        """
        marks = self._marks(chunk, file_id)
        with self._answers_json("batches"):
            async for batch in self.client.batches.list(limit=LISTED):
                if marks.items() <= (batch.metadata or {}).items() and batch.status != "failed":
                    return batch
        return None

    async def at_work(self) -> set[str]:
        """The ids of the account's batches that have not ended, those of other runs included."""
        with self._answers_json("batches"):
            return {batch.id async for batch in self.client.batches.list(limit=LISTED) if batch.status not in ENDED}

    async def create(self, chunk: str, file_id: str) -> Batch:
        return await self.client.batches.create(
            input_file_id=file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata=self._marks(chunk, file_id),
        )

    def _marks(self, chunk: str, file_id: str) -> dict[str, str]:
        return {"distillate_run": self._run_key, "part": chunk, "file": file_id}

    @contextmanager
    def _answers_json(self, path: str) -> Iterator[None]:
        try:
            yield
        except AttributeError:  # how the package meets a page in place of JSON
            raise DistillError(
                f"{self.url}/{path} answers with no JSON; check {self._section}.base_url (…/v1), or does it have a "
                "Batch API?"
            ) from None

    async def retrieve(self, batch_id: str) -> Batch:
        return await self.client.batches.retrieve(batch_id)

    async def download(self, file_id: str, path: Path) -> None:
        """Downloads a file; it appears whole, by rename."""
        try:
            async with self.client.files.with_streaming_response.content(file_id) as response:
                with replacing(path) as file:
                    async for block in response.iter_bytes():
                        file.write(block)
        except httpx2.HTTPError as error:  # the body was cut: the package has its own errors only before the body
            raise openai.APIConnectionError(message=str(error), request=error.request) from None

    def said(self, error: openai.APIError) -> str:
        """What an error says."""
        said: Any = error.body.get("message") if isinstance(error.body, dict) else None
        if isinstance(error, openai.APIConnectionError):  # its own message is "Connection error."
            said = str(error.__cause__ or "")
        return self.words(str(said or error.message))

    def explain(self, error: openai.APIError) -> str:
        """What an error says. Raises DistillError for one that no waiting heals."""
        words = self.said(error)
        if getattr(error, "code", None) == "insufficient_quota":
            raise DistillError(f"{self.url}: the quota is used up ({words}); top it up") from None
        status = error.status_code if isinstance(error, openai.APIStatusError) else 500
        if status < 500 and status not in (408, 409, 429):
            fixes = {401: f"; {self.key}", 404: "; does it have a Batch API? generate.mode online needs none"}
            raise DistillError(f"{self.url} answers {status} ({words}){fixes.get(status, '')}") from None
        return words
