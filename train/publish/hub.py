"""Pushing a folder to the Hub, on request only.

Reads a folder, and the key from the environment (HF_TOKEN); writes to a repository, which it creates private.
"""

import os
from pathlib import Path

from pydantic import SecretStr

from pipeline.errors import DistillError, UsageError, first_line

TOKEN_VARIABLE = "HF_TOKEN"


def token_for(repo: str) -> SecretStr:
    """The key to push with. Raises UsageError if it is not set, or `repo` is no repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push {repo}: {first_line(error)}") from None
    if repo.count("/") != 1:
        raise UsageError(f"--push {repo}: give owner and name, as in me/{repo}")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise UsageError(f"--push needs {TOKEN_VARIABLE}: a key of the Hub that may write to {repo}")
    return SecretStr(token)


def push(folder: Path, repo: str, *, kind: str, token: SecretStr, public: bool = False) -> str:
    """Uploads a folder's files to a model or dataset repository; returns its address.

    Raises UsageError if the Hub refuses, DistillError if it cannot be reached.
    """
    import httpx2  # what huggingface_hub speaks HTTP with, whose errors it lets through
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token.get_secret_value(), library_name="distillate")
    try:
        made = api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        message = f"{folder.name} of a distillation"
        api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        reason = first_line(error.server_message or error)
        refused = f"--push {repo}: the Hub refused ({error.response.status_code}: {reason})"
        raise UsageError(f"{refused}; may the key in {TOKEN_VARIABLE} write there?") from None
    except (httpx2.HTTPError, OSError) as error:
        reason = first_line(error)
        raise DistillError(f"--push {repo}: the Hub cannot be reached ({reason}); {folder} is whole") from None
    return str(made)
