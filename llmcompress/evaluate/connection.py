"""Whether the Hugging Face Hub can be reached, asked once: a library that is asked to load would try again and again.

reachable ──> load as usual          not reachable ──> local copies only, and the first that is not there ends it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmcompress.errors import LLMCompressError

TIMEOUT_S = 5.0
CLIENTS = {"TransportError", "RequestException"}
"""What httpx and requests call a failed request; which of them the Hub's library uses is its own affair."""


def reachable() -> bool:
    """Whether the Hub (or what stands for it in HF_ENDPOINT) responds at all; False where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # noqa: BLE001 - an HTTP client's, a proxy's, the resolver's or the offline switch's
        return False
    return True


@contextmanager
def local_copies_only() -> Iterator[None]:
    """Within the block the Hub's libraries look for local copies and ask nobody; then all is as before."""
    import datasets.config
    from huggingface_hub import constants

    switches = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)


def lost(error: BaseException) -> bool:
    """Whether an error comes from a connection that could not be made or broke off."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ConnectionError | TimeoutError) or CLIENTS & {
            kind.__name__ for kind in type(chain).__mro__
        }:
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def no_data(task: str, dataset: object) -> LLMCompressError:
    """The error for a task whose data is neither here nor to be had."""
    return LLMCompressError(
        f"task {task}: its data, {dataset}, has no local copy, and the Hugging Face Hub cannot be reached",
        "a first run needs a network (HF_ENDPOINT names a mirror), later ones use the local copy; "
        "to read local files, write a task with `dataset_path: json` and `data_files`: `llmcompress guide evaluate`",
    )
