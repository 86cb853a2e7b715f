"""Whether the Hugging Face Hub can be reached, asked once: a library that is asked to load would try again and again.

reachable ──> load as usual          not reachable ──> local copies only, and the first that is not there ends it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmcompress.checkpoint.hub import offline_modules
from llmcompress.checkpoint.hub import reachable as reachable
from llmcompress.errors import LLMCompressError

CLIENTS = {"TransportError", "RequestException"}
"""What httpx and requests call a failed request; which of them the Hub's library uses is its own affair."""


@contextmanager
def local_copies_only() -> Iterator[None]:
    """Within the block the Hub's libraries look for local copies and ask nobody; then all is as before."""
    modules = offline_modules()
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


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
