"""What every shipped recipe writes, as sha256 of its weight files: a refactor leaves these bytes as they are.

    python -m tests.golden.digests             make them all and compare with digests.json
    python -m tests.golden.digests --write     make them all and keep what came out (say in the commit why it changed)

Each shipped recipe is run on a small model by the command line, without its evidence stages; a few more cases cover the
grids, layouts and efforts that no shipped recipe uses. Float sums differ between processors and releases of torch, so
digests are kept under a key of both, and a machine without an entry has nothing to compare with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("digests.json")
TRANSFORMS = ("finetune", "merge", "distill", "quantize")
SMALL = {"calibration": "tiny", "num_samples": 16, "seq_len": 64}
ROWS = {"path": "ROWS", "seq_len": 64}

SHIPPED: dict[str, dict[str, Any]] = {
    "quickstart": {"quantize.format": ["gptq", "compressed_tensors"]},
    "w4a16-gptq": {"model": "bundled/tiny", **{f"quantize.{key}": value for key, value in SMALL.items()}},
    "w4a16-rtn": {"model": "bundled/tiny"},
    "nf4-gptq": {"model": "bundled/tiny", **{f"quantize.{key}": value for key, value in SMALL.items()}},
    "qlora-merge-gptq": {
        "finetune.data": ROWS, "finetune.training.max_steps": 4, "quantize.num_samples": 16, "quantize.seq_len": 64,
    },
    "distill": {"quantize.format": "gptq", "distill.data": ROWS, "distill.training.max_steps": 4, "quantize.num_samples": 16, "quantize.seq_len": 64},
    "distilbert": {"model": "MASKED", "distill.data.path": "LABELLED", "distill.training.max_steps": 4},
    "tinybert": {"model": "CLASSIFIER", "distill.data.path": "LABELLED", "distill.training.max_steps": 4},
}  # fmt: skip
"""Recipe -> the values that make it small."""

FURTHER: dict[str, dict[str, Any]] = {
    "w3-asymmetric-grid": {
        **SMALL,
        "scheme": "W3A16",
        "group_size": 64,
        "symmetric": False,
        "format": "compressed_tensors",
    },
    "w2-aimed": {**SMALL, "scheme": "W2A16", "asymmetric_calibration": True, "format": "compressed_tensors"},
    "w4-effort-max": {**SMALL, "group_size": 64, "effort": "max", "tune_steps": 2, "format": "gptq"},
    "w4-recomputed": {**SMALL, "group_size": -1, "activation_memory_mb": 0, "format": "gptq"},
    "w8-rtn": {"scheme": "W8A16", "method": "rtn", "format": "gptq"},
    "nf4-dq": {**SMALL, "scheme": "NF4-DQ", "format": "bitsandbytes"},
    "nf4-rtn": {"scheme": "NF4", "method": "rtn", "format": "bitsandbytes"},
    "mixed": {**SMALL, "overrides": [{"pattern": "*.down_proj", "scheme": "W8A16"}], "format": "compressed_tensors"},
}
"""Name -> settings of one quantize stage on the bundled checkpoint."""


def names() -> list[str]:
    """Every case."""
    return [*SHIPPED, *FURTHER]


def machine() -> str:
    """The key under which digests are kept: release of torch, instruction set and processor."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {model[1] if model else 'unnamed'}"


def made(name: str, folder: Path) -> dict[str, str]:
    """Run one case below `folder`; weight file -> its sha256."""
    recipe, changes = _recipe(name)
    file, out = folder / f"{name}.yaml", folder / name
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    said = [f"{key}={json.dumps(_placed(value, folder))}" for key, value in changes.items()]
    command = [sys.executable, "-m", "llmcompress", "run", str(file), f"output={out}", *said]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    found = sorted(out.rglob("*.safetensors"))
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _recipe(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if name in FURTHER:
        return {"model": "bundled/tiny", "output": "-", "stages": [{"quantize": FURTHER[name]}]}, {}
    shipped = yaml.safe_load((ROOT / "llmcompress" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    kept = [stage for stage in shipped["stages"] if next(iter(stage)) in TRANSFORMS]
    return shipped | {"stages": kept}, SHIPPED[name]


def _placed(value: Any, folder: Path) -> Any:
    """`value` with the names of inputs replaced by files made below `folder`."""
    if isinstance(value, dict):
        return {key: _placed(entry, folder) for key, entry in value.items()}
    return str(_INPUTS[value](folder)) if isinstance(value, str) and value in _INPUTS else value


def _rows(folder: Path) -> Path:
    lines = (ROOT / "calibration" / "tiny.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _labelled(folder: Path) -> Path:
    from tests import tiny_models

    path = folder / "labelled.jsonl"
    rows = [{"text": tiny_models.words(24, seed=seed), "label": seed % 3} for seed in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _encoder(auto: str, **changes: Any) -> Any:
    def build(folder: Path) -> Path:
        from tests import tiny_models

        return tiny_models.save_encoder(folder / auto, auto, layers=12, **changes)

    return build


_INPUTS: dict[str, Any] = {
    "ROWS": _rows,
    "LABELLED": _labelled,
    "MASKED": _encoder("AutoModelForMaskedLM"),
    "CLASSIFIER": _encoder("AutoModelForSequenceClassification", num_labels=3),
}


def main() -> int:
    """Make every case; write what came out, or say what differs."""
    kept: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    wanted = [word for word in sys.argv[1:] if not word.startswith("-")] or names()
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: made(name, Path(scratch)) for name in wanted}
    if "--write" in sys.argv:
        kept[machine()] = kept.get(machine(), {}) | found
        FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    known = kept.get(machine(), {})
    differ = [name for name in wanted if found[name] != known.get(name)]
    sys.stdout.write(f"{machine()}: {len(wanted) - len(differ)} of {len(wanted)} as before; different: {differ}\n")
    return bool(differ)


if __name__ == "__main__":
    raise SystemExit(main())
