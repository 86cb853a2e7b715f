"""The one place that talks to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import LLMCompressError

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "LICENSE*", "*.tiktoken"]


def fetch(hub_id: str, revision: str | None, allow_pickle: bool) -> tuple[Path, str | None]:
    """The local folder of a Hub checkpoint and the commit it is at; downloads what is not cached.

    Raises: LLMCompressError when it is unknown, private, or cannot be reached and is not cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = PATTERNS + (["*.bin"] if allow_pickle else [])
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LLMCompressError(
            f"{hub_id}{at}: cannot be fetched from the Hub ({first})",
            "check the name and the network, `hf auth login` for a private one, or pass a local folder",
        ) from error
    return folder, folder.name if folder.parent.name == "snapshots" else revision
