"""The command line: exit codes, one clear line for a mistake, data on stdout and nothing else there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmcompress.report import RunReport
from tests import tiny_models


def llmcompress(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmcompress", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save(tmp_path_factory.mktemp("cli") / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(model: Path) -> Path:
    out = model.parent / "out"
    done = llmcompress("quantize", model, "-o", out, "--method", "rtn", "--group-size", 32)
    assert done.returncode == 0, done.stderr
    return out


def test_quantize_writes_a_verified_checkpoint_and_its_card(compressed: Path) -> None:
    report = RunReport.load(compressed)
    assert [row.name for row in report.stages] == ["quantize", "verify", "check", "card"]
    assert len(report.checks) == 8 and all(check.passed for check in report.checks)
    assert (compressed / "README.md").is_file() and (compressed / "llmcompress" / "recipe.yaml").is_file()


def test_json_is_all_that_stdout_holds(compressed: Path) -> None:
    done = llmcompress("verify", compressed, "--json")
    assert done.returncode == 0, done.stderr
    assert [check["name"] for check in json.loads(done.stdout)["checks"]] == [
        "files",
        "tensors",
        "untouched",
        "round trip",
        "side files",
        "logits",
        "generation",
        "engine",
    ]


def test_a_failed_check_is_exit_code_1_and_named(compressed: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(compressed, broken)
    shard = broken / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = llmcompress("verify", broken)
    assert done.returncode == 1
    assert "FAILED files: model.safetensors has changed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["quantize", "MODEL", "-o", "OUT", "--scheme", "W4A61"], "unknown scheme 'W4A61'", "did you mean 'W4A16'?"),
        (["quantize", "MODEL", "-o", "OUT"], "calibration: must be given", "--calibration"),
        (["quantize", "MODEL", "-o", "OUT", "--method", "gtpq"], "unknown method 'gtpq'", "did you mean 'gptq'?"),
        (["quantize", "MODEL", "-o", "OUT", "--on-failure", "shrug"], "on_failure", None),
        (["quantize", "MODEL", "-o", "OUT", "--set", "quantize.x=1"], "unknown setting 'x'", None),
        (["quantize", "OUT", "-o", "OUT2"], "OUT", None),
        (["evaluate", "MODEL", "--suite", "tiny"], "was not made by llmcompress", "pass --baseline"),
        (["evaluate", "MODEL", "--baseline", "MODEL", "--suite", "tinny"], "unknown suite 'tinny'", "did you mean 'tiny'?"),
        (["verify", "MODEL"], "report.json: not found", "only a folder that llmcompress wrote"),
        (["run", "quickstrat"], "unknown recipe 'quickstrat'", "did you mean 'quickstart'?"),
        (["recipes", "show", "x"], "unknown recipe 'x'", None),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, hint: str | None, model: Path, tmp_path: Path
) -> None:
    places = {"MODEL": model, "OUT": tmp_path / "OUT", "OUT2": tmp_path / "OUT2"}
    done = llmcompress(*(places.get(word, word) for word in arguments))
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], done.stderr
    assert hint is None or any(line.startswith("hint: ") and hint in line for line in done.stderr.splitlines())
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_finished(model: Path, tmp_path: Path) -> None:
    script = f"""
import errno, sys
from llmcompress.cli import main as cli
from llmcompress.compress import workspace
def full(path, data):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))
workspace.write_atomic = full
sys.argv = ["llmcompress", "quantize", {str(model)!r}, "-o", {str(tmp_path / "OUT")!r}, "--method", "rtn", "--group-size", "32"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    assert "no space left on the disk" in done.stderr and "hint: free some" in done.stderr
    assert not (tmp_path / "OUT").exists()


def test_an_unknown_option_is_exit_code_2() -> None:
    done = llmcompress("quantize", "m", "-o", "o", "--shceme", "NF4")
    assert done.returncode == 2 and "--shceme" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupted_run_leaves_130_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_models.save(tmp_path / "model", _deep_llama())
    tiny_models.save_tokenizer(source)
    (tmp_path / "text.txt").write_text(tiny_models.words(20000))
    asked = ["quantize", source, "--calibration", tmp_path / "text.txt", "--num-samples", 64, "--seq-len", 128]
    asked += ["--group-size", 32, "--json", "-o"]
    command = [sys.executable, "-m", "llmcompress", *map(str, asked), str(tmp_path / "out")]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job has it ignored
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob(".out.partial/layer-*.json")) and running.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 130, err
    assert out == "" and "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    resumed, whole = (llmcompress(*asked, tmp_path / name) for name in ("out", "whole"))
    assert "resuming: " in resumed.stderr and "resuming: " not in whole.stderr
    made = [json.loads(done.stdout)["output"]["digests"] for done in (resumed, whole)]
    assert made[0] == made[1]
    assert not list(tmp_path.glob(".*"))


def _deep_llama() -> object:
    config = tiny_models.configs()["llama"]
    config.num_hidden_layers = 12
    return config


@pytest.mark.parametrize(
    "arguments",
    [["recipes", "ls"], ["recipes", "show", "quickstart"], ["methods"], ["guide"], ["plan", "bundled/tiny"]],
    ids=" ".join,
)
def test_json_is_asked_for_alike_everywhere(arguments: list[str]) -> None:
    done = llmcompress(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) is not None
    assert llmcompress(*arguments).stdout.strip()


def test_each_check_gives_json(compressed: Path) -> None:
    for arguments in (["check", compressed], ["card", compressed], ["push", compressed, "user/name", "--dry-run"]):
        assert json.loads(llmcompress(*arguments, "--json").stdout)


def test_a_checkpoint_of_others_is_checked_and_left_as_it_is(model: Path) -> None:
    before = sorted(model.rglob("*"))
    done = llmcompress("check", model, "--engine", "vllm")
    assert done.returncode == 0 and done.stdout.startswith("vllm "), done.stderr
    assert sorted(model.rglob("*")) == before
