"""What holds for every test: one thread, so that figures repeat; no Hub; no network unless the test is marked so."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch and numba when they are first imported
os.environ["MPLBACKEND"] = "agg"

import socket
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that would leave this machine, with a line that names the address."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test without the mark `network` connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


LONG = ("integration/", "unit/cli/", "unit/pipeline/", "unit/finetune/", "unit/publish/", "unit/verify/")
"""What runs whole commands: begun first, so that several processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of long tests first; the order within a file stays."""
    items.sort(key=lambda item: not any(part in item.path.as_posix() for part in LONG))
