"""The one place that talks to the Hugging Face Hub."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import LLMCompressError, third_party

TIMEOUT_S = 5.0
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "*.tiktoken"]


def fetch(hub_id: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None]:
    """The local folder of a Hub checkpoint and the commit it is at; downloads what is not cached.

    Raises: LLMCompressError when it is unknown, private, or cannot be reached and is not cached.
    """
    from huggingface_hub import snapshot_download

    patterns = PATTERNS + (["*.bin"] if allow_pickle else [])
    at = f" at revision {revision}" if revision else ""
    hint = "check the name and the network, `hf auth login` for a private one, or pass a local folder"
    with third_party(f"{hub_id}{at}: cannot be fetched from the Hub", hint):
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    return folder, folder.name if folder.parent.name == "snapshots" else revision


@dataclass(frozen=True, slots=True)
class Pushed:
    """What came of a push: the commit's address and, where one was opened, the pull request's."""

    commit: str
    pull_request: str | None


def push(
    repo_id: str,
    files: Sequence[tuple[str, Path | bytes]],
    *,
    message: str,
    public: bool,
    revision: str | None,
    pull_request: bool,
) -> Pushed:
    """Put files (name in the repository, path or bytes) on the Hub as one commit; the repository is made if need be.

    What an interrupted push has uploaded is not sent again. The token is the environment's or that of `hf auth login`.

    Raises: LLMCompressError when there is no token, the Hub refuses, or a repository that should be private is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token, utils

    token = get_token()
    if token is None:
        raise LLMCompressError("no access token for the Hub", "set HF_TOKEN, or run `hf auth login`")
    if not sys.stderr.isatty():
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    api = HfApi(token=token)
    with _said_plainly(repo_id, token):
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and api.repo_info(repo_id).private is False:
            raise LLMCompressError(
                f"{repo_id}: exists and is public, and this push is private",
                "pass --public, choose another repository, or make that one private",
            )
        if revision is not None and not pull_request:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files],
            commit_message=message,
            revision=revision,
            create_pr=pull_request,
        )
    return Pushed(commit=str(done.commit_url), pull_request=done.pr_url)


ADVICE = {
    401: "the token is not valid: set HF_TOKEN, or run `hf auth login`",
    403: "the token may not write there: take one with write access, or another owner's name",
    404: "the Hub knows no such repository or revision, or the token may not see it",
    409: "something else changed it at the same time: run the same command again",
    412: "something else changed it at the same time: run the same command again",
    429: "the Hub asks for patience: run the same command again later; what was uploaded is kept",
}


WITHOUT_XET = "run the same command again; for an endpoint without Xet storage, set HF_HUB_DISABLE_XET=1"
"""Where hf_xet is installed the client uploads through it, to the Hub's own storage, and knows no other way then."""


@contextmanager
def _said_plainly(repo_id: str, token: str) -> Iterator[None]:
    """Turn what the client raises into one line and a hint, without the token, and keep it out of the log too."""
    hide = _Hide(token)
    logging.getLogger("huggingface_hub").addFilter(hide)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(hide)
    try:
        yield
    except LLMCompressError:
        raise
    except Exception as error:  # noqa: BLE001 - the client, its transport and its threads raise many kinds
        root = _root(error)
        status = getattr(getattr(root, "response", None), "status_code", None)
        said = hide.cleaned(_first_lines(root))
        again = WITHOUT_XET if "xet-" in said else "run the same command again; what was uploaded is kept"
        code = f"{status}: " if status else ""
        raise LLMCompressError(f"{repo_id}: the push failed ({code}{said})", ADVICE.get(status or 0, again)) from None


def _root(error: BaseException) -> BaseException:
    """What an error was raised from, at the bottom: the client wraps what happened in its upload threads."""
    while error.__cause__ is not None and isinstance(error, RuntimeError):
        error = error.__cause__
    return error


def _first_lines(error: BaseException) -> str:
    server = getattr(error, "server_message", None)
    lines = [line.strip() for line in str(server or error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


class _Hide(logging.Filter):
    """Takes the token out of every record."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def cleaned(self, text: str) -> str:
        """`text` without the token."""
        return text.replace(self._token, "***")

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the record pass, cleaned."""
        record.msg, record.args = self.cleaned(record.getMessage()), ()
        return True


def reachable() -> bool:
    """Whether the Hub (or what stands for it in HF_ENDPOINT) responds at all; False where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # noqa: BLE001 - an HTTP client's, a proxy's, the resolver's or the offline switch's
        return False
    return True


def offline_modules() -> list[Any]:
    """The modules whose `HF_HUB_OFFLINE` decides whether the Hub's libraries ask it."""
    import datasets.config
    from huggingface_hub import constants

    return [constants, datasets.config]
