"""An output belongs to one process, and only what a run wrote is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.checkpoint.writer import give_name
from llmcompress.errors import LLMCompressError
from llmcompress.pipeline.output import claimed, refuse_foreign
from llmcompress.report import FILE, FOLDER, RunReport


def result(folder: Path, *, created: str = "2026-01-01T00:00:00+00:00", format: str = "gptq", mark: str = "") -> Path:
    """A finished folder as a stage leaves it, before it has its name."""
    output = {
        "format": format, "files": {"model.safetensors": 1}, "digests": {}, "weights_bytes": 1, "bits_per_weight": 4.0,
        "bits_per_weight_model": 4.0, "quantized_parameters": 1, "total_parameters": 1,
    }  # fmt: skip
    report = RunReport.model_validate(
        {"created": created, "recipe": {}, "seed": 0, "environment": environment(), "output": output}
    )
    report.save(folder)
    (folder / "model.safetensors").write_text("w")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(mark)
    return folder


def environment() -> dict[str, object]:
    from llmcompress.report.environment import describe

    return describe().model_dump()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    give_name(result(tmp_path / "scratch"), tmp_path / "out")
    return tmp_path / "out"


# --- what may be replaced ---


def test_a_result_is_replaced_whole(out: Path, tmp_path: Path) -> None:
    (out / "README.md").write_text("card")
    (out / FOLDER / "samples").mkdir()
    (out / FOLDER / "samples" / "task-0shot.jsonl").write_text("{}")
    (out / FOLDER / "figures").mkdir()
    (out / FOLDER / "figures" / "scores.png").write_bytes(b"")
    (out / FOLDER / "report.tmp").write_text("of a run that was killed")
    refuse_foreign(out)
    give_name(result(tmp_path / "scratch", mark="new"), out)
    assert (out / "tokenizer.json").read_text() == "new" and not (out / "README.md").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.md", "llmcompress/notes.md", "sub/deep/thesis.tex", "id_rsa", ".hidden"])
def test_what_somebody_put_into_a_result_is_named_and_kept(name: str, out: Path, tmp_path: Path) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(LLMCompressError, match=f"holds {name}, which llmcompress did not write"):
        refuse_foreign(out)
    with pytest.raises(LLMCompressError, match="did not write"):
        give_name(result(tmp_path / "scratch"), out)
    assert (out / name).read_text() == "mine" and (out / "model.safetensors").exists()


def test_a_result_without_an_inventory_holds_what_its_report_lists(out: Path) -> None:
    (out / FOLDER / ".files.json").unlink()
    with pytest.raises(LLMCompressError, match=r"holds tokenizer\.json"):
        refuse_foreign(out)
    (out / "tokenizer.json").unlink()
    refuse_foreign(out)


def test_a_parent_of_other_results_is_named_and_kept(tmp_path: Path) -> None:
    parent = tmp_path / "results"
    for index, name in enumerate(("a", "b")):
        give_name(result(tmp_path / "scratch", created=f"2026-01-0{index + 1}T00:00:00+00:00"), parent / name)
    with pytest.raises(LLMCompressError, match="holds the results a, b, which are not of one run"):
        refuse_foreign(parent)
    with pytest.raises(LLMCompressError, match="not of one run"):
        give_name(result(tmp_path / "scratch"), parent)
    assert (parent / "a" / "model.safetensors").exists()


def test_the_layouts_of_one_run_are_replaced_together(tmp_path: Path) -> None:
    for mark in ("", "new"):
        for name in ("gptq", "compressed_tensors"):
            result(tmp_path / "scratch" / name, format=name, mark=mark)
        give_name(tmp_path / "scratch", tmp_path / "out")
        refuse_foreign(tmp_path / "out")
    assert (tmp_path / "out" / "gptq" / "tokenizer.json").read_text() == "new"
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(LLMCompressError, match=r"holds notes\.md"):
        refuse_foreign(tmp_path / "out")


# --- where an output can lie ---


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    disk = tmp_path / "other disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk)
    with claimed(tmp_path / "out") as out:
        assert out == disk
        give_name(result(tmp_path / "scratch"), out)
    assert (tmp_path / "out").is_symlink() and (disk / "model.safetensors").exists()


def test_a_name_that_cannot_be_an_output_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loose").symlink_to(tmp_path / "gone")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cases = {
        ".": "is the working directory", "..": "is the working directory", "../loose": "is a link to nothing",
        "../file/out": "is a file", "x" * 201: "longer than 200 bytes",
    }  # fmt: skip
    for name, expected in cases.items():
        with pytest.raises(LLMCompressError, match=expected), claimed(name):
            raise AssertionError("claimed")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LLMCompressError, match="cannot be written"), claimed(tmp_path / "out"):
        raise AssertionError("claimed")
    tmp_path.chmod(0o700)


# --- one process at a time ---

HOLD = "import sys, time; from llmcompress.pipeline.output import claimed\nwith claimed(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def test_a_second_process_gets_one_line_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(LLMCompressError) as caught, claimed(out):
                raise AssertionError("claimed")
            assert caught.value.message == f"another process (pid {other.pid}) is writing {out}"
        finally:
            other.kill()
            other.wait()
    with claimed(out):
        assert (tmp_path / ".out.lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_several_processes_at_once_write_one_after_the_other(tmp_path: Path) -> None:
    log, code = tmp_path / "log", (
        "import sys, time\nfrom pathlib import Path\nfrom llmcompress.errors import LLMCompressError\n"
        "from llmcompress.pipeline.output import claimed\n"
        "for _ in range(20):\n"
        "    try:\n"
        "        with claimed(sys.argv[1]):\n"
        "            with Path(sys.argv[2]).open('a') as file: file.write('in\\n'); file.flush(); time.sleep(.002); file.write('out\\n')\n"
        "    except LLMCompressError: pass\n"
    )  # fmt: skip
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), str(log)]) for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    lines = log.read_text().split()
    assert lines == ["in", "out"] * (len(lines) // 2)


# --- what a killed run left ---


def test_a_result_that_was_set_aside_is_put_back(out: Path, tmp_path: Path) -> None:
    out.rename(tmp_path / ".out.old")
    with claimed(out) as held:
        assert (held / FOLDER / FILE).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_left_beside_a_finished_output_goes(out: Path, tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old", ".out.distill-0123"):
        (tmp_path / name / "final").mkdir(parents=True)
    steps = tmp_path / ".out.stages"
    for name in (".merge-0123.partial", "merge-0123"):
        (steps / name).mkdir(parents=True)
    (tmp_path / ".other.partial").mkdir()
    with pytest.raises(LLMCompressError, match="stopped"), claimed(out):
        raise LLMCompressError("stopped")
    assert (tmp_path / ".out.partial").exists()
    with claimed(out):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial", ".out.stages", "out"]
    assert [path.name for path in steps.iterdir()] == ["merge-0123"], "a finished step is kept for the next run"


@pytest.mark.parametrize("killed_after", range(1, 40, 4))
def test_no_moment_of_a_kill_loses_a_result(killed_after: int, out: Path, tmp_path: Path) -> None:
    result(tmp_path / "scratch", mark="new")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom llmcompress.checkpoint.writer import give_name\ncount = 0\n"
        "def stop(event, args):\n"
        "    global count\n"
        "    count += event in ('os.rename', 'os.remove', 'os.rmdir', 'shutil.rmtree', 'os.unlink')\n"
        "    if count > int(sys.argv[3]): os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(stop)\ngive_name(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "scratch"), str(out), str(killed_after)], check=False)
    with claimed(out):
        pass
    files = json.loads((out / FOLDER / ".files.json").read_text())["files"]
    assert all((out / name).is_file() for name in files) and (out / "tokenizer.json").read_text() in ("", "new")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "scratch") == ["out"]
