"""A finished output folder, and a Hub on this machine that the real client talks to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport
from scripts.local_hub import LocalHub
from tests import tiny_models

TOKEN = "hf_" + "Secret0123456789abcdefghij"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT, verified, checked, with its card; its source states a license."""
    root = tmp_path_factory.mktemp("publish")
    source = tiny_models.save(root / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    quantize = {"method": "rtn", "group_size": 32, "format": "compressed_tensors"}
    stages = [{"quantize": quantize}, {"verify": {}}, {"check": {}}, {"card": {}}]
    run(Recipe.of({"model": str(source), "output": str(root / "small-llama"), "stages": stages}), Silent())
    return root / "small-llama"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "small-llama"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The local Hub; the client of this process is pointed at it and does not wait between its attempts."""
    from huggingface_hub import constants

    server = LocalHub(tmp_path / "hub", TOKEN).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def change_report(folder: Path, **changes: object) -> RunReport:
    """The folder's report with other values, saved."""
    report = RunReport.load(folder).model_copy(update=changes)
    report.save(folder)
    return report
