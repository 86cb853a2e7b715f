"""Push, with huggingface_hub's own client against a Hub on this machine: what arrives, and what happens when it fails."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError
from llmcompress.publish.push import plan, push
from scripts.local_hub import Fault, LocalHub
from tests.unit.publish.conftest import TOKEN

COMMIT = r"POST /api/models/me/small/commit/main"
UPLOADS = "PUT /lfs/"


def pushed(out: Path, **how: Any) -> str:
    include = how.pop("include", ())
    planned = plan(out, "me/small", public=how.get("public", False), include=include)
    done = push(planned, public=how.pop("public", False), **how)
    return done.pull_request or done.commit


def files_of(hub: LocalHub, revision: str = "main") -> dict[str, bytes]:
    repo = hub.repos["me/small"]
    commit = repo.commit_of(revision)
    assert commit is not None
    return {name: (hub.blobs / sha).read_bytes() for name, sha in repo.files[commit].items()}


def count(hub: LocalHub, start: str) -> int:
    return sum(line.startswith(start) for line in hub.requests)


def test_one_commit_with_card_and_weights_in_a_private_repository(out: Path, hub: LocalHub) -> None:
    address = pushed(out)
    repo, files = hub.repos["me/small"], files_of(hub)
    assert repo.private and len(repo.branches["main"]) == 2 and address.endswith(repo.branches["main"][-1])
    assert count(hub, "POST /api/models/me/small/commit/") == 1
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "tokenizer.json", "llmcompress/report.json"} <= files.keys()


def test_what_arrives_speaks_of_no_machine_and_names_the_repository(out: Path, hub: LocalHub) -> None:
    pushed(out)
    files = files_of(hub)
    place = str(out.parent)
    assert not [name for name, content in files.items() if place.encode() in content or b"/tmp/" in content]
    card = files["README.md"].decode()
    assert "me/small" in card and "USER/" not in card and "license: apache-2.0" in card
    assert json.loads(files["llmcompress/report.json"])["source"]["name"] == "model"


def test_pulled_back_it_is_the_same_checkpoint(
    out: Path, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    pushed(out)
    back = Checkpoint.open("me/small")
    assert back.identity() == Checkpoint.open(out).identity()
    assert back.hub_id == "me/small" and back.revision == hub.repos["me/small"].branches["main"][-1]


def test_public_a_branch_and_a_pull_request(out: Path, hub: LocalHub) -> None:
    pushed(out, public=True)
    assert hub.repos["me/small"].private is False
    pushed(out, public=True, revision="w4")
    (out / "notes.txt").write_text("more")
    address = pushed(out, public=True, pull_request=True, include=["notes.txt"])
    assert address.endswith("/discussions/1")
    assert "notes.txt" in files_of(hub, "refs/pr/1") and "notes.txt" not in files_of(hub)
    assert "model.safetensors" in files_of(hub, "w4")


def test_a_private_push_to_a_public_repository_is_refused(out: Path, hub: LocalHub) -> None:
    pushed(out, public=True)
    with pytest.raises(LLMCompressError, match="exists and is public") as error:
        pushed(out)
    assert "--public" in str(error.value.hint)


def test_what_was_uploaded_is_not_sent_again(out: Path, hub: LocalHub) -> None:
    hub.faults += [Fault(COMMIT, 503, message="down")]
    with pytest.raises(LLMCompressError, match="503"):
        pushed(out)
    sent = count(hub, UPLOADS)
    assert sent >= 1 and "model.safetensors" not in files_of(hub)
    pushed(out)
    assert count(hub, UPLOADS) == sent and "model.safetensors" in files_of(hub)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited, in its own words; nobody waits."""
    slept: list[float] = []
    real = time.sleep
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: slept.append(s) if s > 0.2 else real(s))
    return slept


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault(r"PUT /lfs/", cut_after_bytes=100), True),
        (Fault(r"PUT /lfs/", 500), True),
        (Fault(r"POST .*/preupload/", 503), True),
        (Fault(r"POST .*/objects/batch", 429, {"Retry-After": "7"}), True),
    ],
    ids=["a connection cut in an upload", "500 from storage", "503 before it", "429 with retry-after"],
)
def test_a_passing_fault_is_overcome(fault: Fault, waited: bool, out: Path, hub: LocalHub, waits: list[float]) -> None:
    hub.faults.append(fault)
    pushed(out)
    assert files_of(hub)["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert len(waits) == 1 and (waits[0] >= 7 if fault.status == 429 else waits[0] <= 2)


@pytest.mark.parametrize(
    ("fault", "said", "advice"),
    [
        (Fault(r"POST /api/repos/create", 401, message="Invalid username or password."), "401: ", "HF_TOKEN"),
        (Fault(r"POST /api/repos/create", 403, message="You don't have the rights"), "403: ", "write access"),
        (Fault(COMMIT, 403, message="Forbidden: pass `create_pr=1`"), "403: ", "write access"),
        (Fault(COMMIT, 409, message="A commit has happened since"), "409: ", "run the same command again"),
        (
            Fault(COMMIT, 412, message="A commit has happened since"),
            "412: A commit has happened",
            "run the same command",
        ),
        (Fault(COMMIT, 429, {"Retry-After": "60"}, message="Too many requests"), "429: ", "later"),
        (Fault(COMMIT, 500, message="Internal error"), "500: ", "run the same command again"),
        (Fault(COMMIT, cut_after_bytes=10), "the push failed", "run the same command again"),
        (Fault(r"POST /api/validate-yaml", 400, message="bad"), "metadata in README.md", "run the same command"),
    ],
    ids=lambda value: f"{value.pattern.split('/')[-2:]} {value.status}" if isinstance(value, Fault) else "",
)
def test_a_fault_that_stays_is_one_line_and_leaves_nothing_half_done(
    fault: Fault, said: str, advice: str, out: Path, hub: LocalHub, waits: list[float]
) -> None:
    hub.faults.append(fault)
    with pytest.raises(LLMCompressError) as error:
        pushed(out)
    assert said in error.value.message and advice in str(error.value.hint), error.value.lines()
    assert "\n" not in error.value.message and TOKEN not in "".join(error.value.lines())
    assert len(hub.repos["me/small"].branches["main"]) == 1 if "me/small" in hub.repos else True


def test_storage_that_stays_down_is_said_as_it_is(out: Path, hub: LocalHub, waits: list[float]) -> None:
    hub.faults += [Fault(r"PUT /lfs/", 503, message="storage is down") for _ in range(40)]
    with pytest.raises(LLMCompressError, match="503: ") as error:
        pushed(out)
    assert len(waits) >= 5 and "what was uploaded is kept" in str(error.value.hint)


def test_a_token_is_needed(out: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(LLMCompressError, match="no access token"):
        pushed(out)
    assert not hub.requests


def test_the_token_is_in_no_log_error_or_body(
    out: Path, hub: LocalHub, waits: list[float], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    hub.faults += [Fault(r"POST .*/preupload/", 503, message=TOKEN), Fault(COMMIT, 403, message=f"bad token {TOKEN}")]
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG, "huggingface_hub"), pytest.raises(LLMCompressError) as error:
        pushed(out)
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert "bad token ***" in error.value.message and error.value.__cause__ is None
    assert "503" in caplog.text and TOKEN not in caplog.text
    assert not [body for body in hub.bodies if TOKEN.encode() in body]
    assert not [path for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def command(hub: LocalHub, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    line = [sys.executable, "-m", "llmcompress", *map(str, words)]
    return subprocess.run(line, env=given | environment, capture_output=True, text=True, check=False, timeout=120)


def test_as_a_command(out: Path, hub: LocalHub) -> None:
    dry = command(hub, "push", out, "me/small", "--dry-run")
    assert dry.returncode == 0 and "nothing was sent" in dry.stdout and "model.safetensors" in dry.stdout
    assert not hub.requests
    done = command(hub, "push", out, "me/small", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"].startswith(f"{hub.address}/me/small/commit/")
    refused = command(hub, "push", out, "me/other", HF_TOKEN="hf_" + "wrong" * 6)
    assert refused.returncode == 2 and "401" in refused.stderr and "Traceback" not in refused.stderr
    assert "hf_wrong" not in refused.stderr + refused.stdout and TOKEN not in done.stderr + done.stdout


def test_an_endpoint_without_xet_storage_is_said_with_the_way_around_it(
    out: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(LLMCompressError, match="404 Not Found") as error:
        pushed(out)
    assert "HF_HUB_DISABLE_XET=1" in str(error.value.hint) and TOKEN not in "".join(error.value.lines())
    assert len(hub.repos["me/small"].branches["main"]) == 1
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    pushed(out)
    assert "model.safetensors" in files_of(hub)
