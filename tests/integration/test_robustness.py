"""Commands that are killed, run out of disk, files or memory, or meet another one at the same output.

What holds afterwards: the same command ends in the same bytes, nothing that looks finished is not, nothing that was
there before is lost, and what was said is lines. All with -m slow; the first of each kind is a small one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import read_header
from llmcompress.report import RunReport, is_ours
from tests import tiny_models
from tests.integration.forked import KILLED, Command, Ended

pytestmark = pytest.mark.slow

TIMES = ("llmcompress/report.json", "README.md", "llmcompress/.files.json")
"""What holds times and dates; its figures are compared one by one."""
NOTE = "of somebody else"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """File -> sha256 of everything that must come out the same; the recipe names the output, which differs."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in TIMES and path.suffix != ".png":
            data = (
                path.read_bytes().replace(str(folder).encode(), b"OUT") if path.suffix == ".yaml" else path.read_bytes()
            )
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def figures(folder: Path) -> dict[str, object]:
    """What the report measured, without times."""
    report = json.loads(RunReport.load(folder).model_dump_json())
    tasks = [[row["task"], row["baseline"], row["compressed"]] for found in report["evaluations"] for row in found.get("tasks", [])]  # fmt: skip
    texts = [[row["name"], row.get("kl"), row.get("perplexity")] for found in report["evaluations"] for row in found["texts"]]  # fmt: skip
    return {
        "output": report["output"],
        "tasks": tasks,
        "texts": texts,
        "stages": [row["name"] for row in report["stages"]],
    }


@dataclass(frozen=True)
class Place:
    """A folder for one command, with what it reads in it."""

    folder: Path
    inputs: Path
    cache: Path
    limits: dict[str, int] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def arguments(self, case: str) -> list[object]:
        if case == "evaluate":
            return ["evaluate", self.out, "--suite", self.inputs / "suite.yaml", "--batch-size", 4]
        name = "quantize" if case == "overwrite" else case
        extra = ["--overwrite", "quantize.scheme=W8A16"] if case == "overwrite" else []
        return ["run", self.inputs / f"{name}.yaml", f"output={self.out}", *extra]

    def begin(self, case: str, **limits: int) -> Command:
        return Command(self.arguments(case), self.cache, {**self.limits, **limits}, self.folder)

    def prepare(self, case: str, made: Path) -> None:
        """What lies at the output before the command: nothing, or a result of ours. Beside it, a note of somebody."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "note").write_text(NOTE)
        if case in ("evaluate", "overwrite"):
            shutil.copytree(made, self.out)

    def judge_stopped(self, case: str, made: Path) -> None:
        """After a command that did not end: what can be seen is whole."""
        assert (self.folder / "note").read_text() == NOTE
        if case == "evaluate":
            assert RunReport.load(self.out).output is not None
            assert {name: digest for name, digest in contents(self.out).items() if "samples" not in name and not name.endswith(".tmp")}.items() >= contents(made).items()  # fmt: skip
        seen = [path for path in (self.out, self.folder / ".out.old") if path.exists()]
        for folder in seen:
            whole(folder)
        assert case != "overwrite" or seen, "the old result is lost, and there is no new one"

    def judge_done(self, case: str, reference: Path) -> None:
        """After a command that ended well: the bytes of one that was never stopped, and nothing left beside them."""
        whole(self.out)
        assert contents(self.out) == contents(reference)
        ours, theirs = figures(self.out), figures(reference)
        assert ours == theirs
        assert (self.folder / "note").read_text() == NOTE
        left = [path.name for path in self.folder.glob(".out*") if path.name != ".out.stages"]
        left += [path.name for path in self.folder.glob(".out.stages/.*")]
        left += [path.name for path in self.out.rglob("*.tmp")]
        assert not left


def whole(folder: Path) -> None:
    """A folder that can be seen under its name is a finished result, every file in its size and with its digest."""
    assert is_ours(folder)
    output = RunReport.load(folder).output
    assert output is not None
    assert {name: (folder / name).stat().st_size for name in output.files} == output.files
    assert {name: digest(folder / name) for name in output.digests} == output.digests
    for name in output.files:
        if name.endswith(".safetensors"):
            read_header(folder / name)


def in_lines(ended: Ended) -> None:
    """A command that failed says so in lines: an error, perhaps a hint, nothing of Python's."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.said and "unexpected" not in ended.said, ended.said
    assert ended.problems() and all(len(line) < 700 for line in ended.problems()), ended.said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows, an adapter, a suite and a recipe for each case."""
    folder = tmp_path_factory.mktemp("inputs")
    model = tiny_models.save(folder / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(model)
    rows = [json.dumps({"text": tiny_models.words(24, seed)}) for seed in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "text.txt").write_text("\n\n".join(tiny_models.words(40, seed + 100) for seed in range(8)))
    text = {"name": "t", "file": "text.txt", "field": "text", "seq_len": 16, "num_tokens": 64, "budget_kl": 9.0, "budget_perplexity_ratio": 99.0}  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "description": "d", "tasks": [], "texts": [text]}))
    trained = {"data": {"path": str(folder / "rows.jsonl"), "seq_len": 16}, "training": {"max_steps": 2}}
    quantize = {"quantize": {"method": "rtn", "scheme": "W4A16", "group_size": 32}}
    finetune = {"finetune": {"adapter": "lora", "rank": 2, **trained}}
    merge = {"merge": {"measure": False}}
    stages = {
        "quantize": [quantize, {"card": {}}],
        "finetune": [finetune, {"card": {}}],
        "merge": [{"merge": {"adapters": [{"path": str(folder / "adapter")}], "measure": False}}],
        "distill": [{"distill": {"keep": 0.5, **trained}}],
        "run": [finetune, merge, quantize, {"card": {}}],
    }
    for name, steps in stages.items():
        recipe = {"model": str(model), "output": "out", "stages": steps}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    ended = Command(["run", folder / "finetune.yaml", f"output={folder / 'adapter'}"], folder / "cache").wait()
    assert ended.code == 0, ended.said
    return folder


CASES = ("quantize", "merge", "finetune", "distill", "evaluate", "run", "overwrite")


class References:
    """What each command makes when nothing happens to it, and how long that takes."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self._inputs, self._folder = inputs, folder
        self._made: dict[str, tuple[Path, float]] = {}

    def __call__(self, case: str) -> Path:
        return self._of(case)[0]

    def seconds(self, case: str) -> float:
        return self._of(case)[1]

    def quantized(self) -> Path:
        return self("quantize")

    def _of(self, case: str) -> tuple[Path, float]:
        if case not in self._made:
            place = Place(self._folder / case, self._inputs, self._folder / case / "cache")
            place.prepare(case, self.quantized() if case in ("evaluate", "overwrite") else Path())
            ended = place.begin(case).wait()
            assert ended.code == 0, ended.said
            self._made[case] = place.out, ended.seconds
        return self._made[case]


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(inputs, tmp_path_factory.mktemp("reference"))


def kill_at_random(case: str, number: int, seed: int, inputs: Path, reference: References, folder: Path) -> int:
    """Kill a command `number` times, each at a random moment and begun again; how many it was killed in."""
    dice = random.Random(f"{case} {seed}")
    made, num_killed = reference.quantized(), 0
    before = Checkpoint.open(inputs / "model").identity()
    for turn in range(number):
        place = Place(folder / f"{case}{turn}", inputs, folder / f"{case}{turn}" / "cache")
        place.prepare(case, made)
        for _ in range(dice.randint(1, 2)):
            ended = place.begin(case).kill(dice.uniform(0.02, 1.1 * reference.seconds(case)))
            assert ended.code in (0, KILLED), ended
            num_killed += ended.code == KILLED
            place.judge_stopped(case, made)
        ended = place.begin(case).wait()
        assert ended.code == 0, ended.said
        place.judge_done(case, reference(case))
        shutil.rmtree(place.folder)
    assert Checkpoint.open(inputs / "model").identity() == before
    return num_killed


@pytest.mark.parametrize("case", CASES[:6:2] + CASES[5:])
def test_killed_at_a_random_moment(case: str, inputs: Path, reference: References, tmp_path: Path) -> None:
    kill_at_random(case, 1, 1, inputs, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_many_random_moments(
    case: str, inputs: Path, reference: References, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = kill_at_random(case, 29, 2, inputs, reference, tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\n{case}: killed {killed} times in 29 runs of {reference.seconds(case):.1f} s")
    assert killed >= 20


# --- disks, permissions, limits ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, as small as a test asks for."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", path], capture_output=True, check=False).returncode:  # fmt: skip
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill(case: str, sizes: int, inputs: Path, reference: References, disk: Path) -> int:
    """Run a command on a disk of so many sizes up to what it needs; how often it did not fit."""
    made, num_full = reference.quantized(), 0
    most = 3 * num_bytes(reference(case)) + 200_000
    for size in range(sizes):
        remount(disk, "rw,size=64m")
        place = Place(disk / f"{case}{size}", inputs, disk / f"{case}{size}" / "cache")
        place.prepare(case, made)
        room = 4096 + (most * size // sizes)
        used = shutil.disk_usage(disk).used
        remount(disk, f"size={(used + room) // 1024}k")
        ended = place.begin(case).wait()
        if ended.code:
            num_full += 1
            in_lines(ended)
            place.judge_stopped(case, made)
            remount(disk, "size=64m")
            ended = place.begin(case).wait()
        assert ended.code == 0, ended.said
        place.judge_done(case, reference(case))
        shutil.rmtree(place.folder)
    return num_full


@pytest.mark.parametrize("case", ["quantize", "evaluate"])
def test_a_full_disk(case: str, inputs: Path, reference: References, disk: Path) -> None:
    assert fill(case, 2, inputs, reference, disk)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_disk_of_twenty_sizes(
    case: str, inputs: Path, reference: References, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = fill(case, 20, inputs, reference, disk)
    with capsys.disabled():
        sys.stdout.write(f"\n{case}: did not fit {full} times in 20")
    assert full >= (1 if case == "evaluate" else 3)


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])])
def test_a_disk_that_cannot_be_written(case: str, inputs: Path, reference: References, disk: Path) -> None:
    remount(disk, "rw,size=64m")
    place = Place(disk / case, inputs, disk / "cache")
    place.prepare(case, reference.quantized())
    before = contents(disk)
    remount(disk, "ro")
    in_lines(place.begin(case).wait())
    assert contents(disk) == before


LIMITS = {
    "RLIMIT_FSIZE": [0, 100, 2_000, 20_000, 50_000, 100_000, 120_000],
    "RLIMIT_NOFILE": [6, 9, 12, 15, 18, 24],
    "RLIMIT_AS": [1 << 20, 1 << 30],
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])])
def test_low_limits(
    case: str, limit: str, inputs: Path, reference: References, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    thorough = request.node.get_closest_marker("slow") or "slow" in str(request.config.option.markexpr).split("not ")[0]
    for value in LIMITS[limit] if thorough else LIMITS[limit][1::3]:
        place = Place(tmp_path / f"{case}{value}", inputs, tmp_path / f"{case}{value}" / "cache")
        place.prepare(case, reference.quantized())
        ended = place.begin(case, **{limit: value}).wait()
        if ended.code:
            in_lines(ended)
            place.judge_stopped(case, reference.quantized())
            ended = place.begin(case).wait()
        assert ended.code == 0, ended.said
        place.judge_done(case, reference(case))
        shutil.rmtree(place.folder)


def two_writers(turns: int, inputs: Path, reference: References, folder: Path) -> tuple[int, int]:
    """Two processes and one output, of the same recipe in even turns and of two in odd ones; (ends well, refusals)."""
    done = refused = 0
    for turn in range(turns):
        place = Place(folder / str(turn), inputs, folder / str(turn) / "cache")
        place.prepare("quantize", Path())
        cases = ["quantize", "quantize"] if turn % 2 == 0 else ["quantize", "merge"]
        ends = [command.wait() for command in [place.begin(case) for case in cases]]
        for ended in ends:
            if ended.code == 0:
                done += 1
                continue
            refused += 1
            in_lines(ended)
            assert len(ended.problems()) == 1
            assert any(word in ended.said for word in ("another process", "another recipe")), ended.said
        first = next(case for case, ended in zip(cases, ends, strict=True) if ended.code == 0)
        place.judge_done(first, reference(first))
    return done, refused


def test_two_writers(inputs: Path, reference: References, tmp_path: Path) -> None:
    done, _ = two_writers(2, inputs, reference, tmp_path)
    assert done >= 2


@pytest.mark.slow
def test_two_writers_twenty_times(
    inputs: Path, reference: References, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, refused = two_writers(20, inputs, reference, tmp_path)
    with capsys.disabled():
        sys.stdout.write(f"\ntwo writers, 20 times: {done} ended well, {refused} were told in a line")
    assert refused >= 10
