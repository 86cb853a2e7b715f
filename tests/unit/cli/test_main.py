"""How the command ends: whatever goes wrong is one line, and a traceback is there when it is asked for."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from llmcompress.cli import main as cli
from llmcompress.errors import LLMCompressError, ProblemsError


class OutOfMemoryError(RuntimeError):
    """torch's is called so."""


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (LLMCompressError("scheme: unknown", "did you mean W4A16?"), "error: scheme: unknown", "did you mean"),
        (ProblemsError([LLMCompressError("a"), LLMCompressError("b", "c")]), "error: b", "hint: c"),
        (
            OSError(errno.ENOSPC, "No space left on device", "OUT/x"),
            "error: OUT/x: no space left on the disk",
            "free some",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "error: the output: disk quota exceeded", "free some"),
        (PermissionError(errno.EACCES, "Permission denied", "OUT"), "error: OUT: permission denied", "permissions"),
        (OSError(errno.EROFS, "Read-only file system", "OUT"), "error: OUT: read-only file system", "can be written"),
        (OSError(errno.EMFILE, "Too many open files"), "error: the system: too many open files", "ulimit -n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "error: x: no such file", None),
        (MemoryError(), "error: not enough memory (the system gave no more)", "llmcompress plan"),
        (
            OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "error: not enough memory (CUDA out of memory. Tried)",
            "plan",
        ),
        (RecursionError("maximum recursion depth exceeded"), "error: the input is nested too deeply", cli.DEBUG),
        (ValueError("index 5\nof 4"), "error: unexpected ValueError: index 5", cli.DEBUG),
        (KeyError(), "error: unexpected KeyError: without a message", cli.DEBUG),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "error: the output: no space left on",
            "free some",
        ),
        (OSError(errno.EFBIG, "File too large", "OUT/x"), "error: OUT/x: file too large", "ulimit -f"),
        (OSError("a client's own error"), "error: unexpected OSError: a client's own error", cli.DEBUG),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_exception_is_a_line_with_a_way_out(
    error: Exception, said: str, hint: str | None, debug: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def raises(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("llmcompress.api.tools.recipes", raises)
    monkeypatch.setenv(cli.DEBUG, "1") if debug else monkeypatch.delenv(cli.DEBUG, raising=False)
    assert cli.run(["recipes", "ls"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and ("Traceback" in err) == debug
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert any(line.startswith(said) for line in lines), err
    assert hint is None or any(line.startswith("hint: ") and hint in line for line in lines)


def test_an_interruption_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcompress.api.tools.recipes", interrupted)
    assert cli.run(["recipes", "ls"]) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["quantise", "m"], "unknown command 'quantise'", "did you mean 'quantize'?"),
        (["quantize", "m", "-o", "o", "--shceme", "x"], "--shceme", "llmcompress quantize --help"),
        (["quantize", "m"], "-o", "llmcompress quantize --help"),
        (["recipes", "sho"], "sho", "llmcompress recipes --help"),
        (["quantize", "m", "-o", "o", "--group-size", "x"], "quantize.group_size", None),
        (["quantize", "m", "-o", "o", "--method-setting", "x"], "'x' must be KEY=VALUE", None),
        (["merge", "m", "a", "-o", "o", "--scheme", "NF4"], "--scheme: needs --then quantize", None),
        (["merge", "m", "a", "-o", "o", "--then", "prune"], "only quantize can follow", None),
        (["distill", "--teacher", "a", "-o", "o", "--data", "d", "--teacher-weight", "1", "--teacher-weight", "1"],
         "2 weights for 1 teachers", "give one per --teacher"),
        (["completion", "tcsh"], "unknown shell 'tcsh'", None),
        (["guide", "nothing"], "unknown guide 'nothing'", None),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], said: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and said in errors[0], err
    assert hint is None or f"hint: {hint}" in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    from llmcompress import __version__

    assert cli.run(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__
    assert cli.run(["-h"]) == cli.run(["--help"]) == 0
    assert cli.run([]) == 2 and "Usage:" in capsys.readouterr().err
