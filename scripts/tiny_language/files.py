"""The data files of the bundled checkpoint, as bytes: calibration text, held-out text, items, tasks and the suite.

Everything here follows from the seeds alone, with the standard library alone, so `scripts/make_tiny_model --check`
can make it anew in seconds and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from tiny_language.documents import documents
from tiny_language.items import TASKS, Task, items

CALIBRATION_SEED, HELD_OUT_SEED = 21, 22
CALIBRATION_CHARACTERS, HELD_OUT_CHARACTERS = 240_000, 100_000

CALIBRATION_YAML = """\
name: tiny
description: Documents of the small English that the bundled checkpoint was trained on (scripts/make_tiny_model).
text: tiny.jsonl
field: text
chat_template: false
num_samples: 64
seq_len: 256
seed: 0
licence: Apache-2.0
sha256: {sha256}
"""

TASK_YAML = """\
# {description}
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: ../data/{name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

SUITE_HEAD = """\
name: tiny
description: What the bundled checkpoint can do, on combinations held out from its training.
tasks:
"""

SUITE_TASK = "  - {{task: {name}, metric: acc, num_fewshot: 0, limit: null, budget: 0.02}}\n"

SUITE_TEXTS = """\
texts:
  - name: tiny_heldout
    file: ../data/tiny_heldout.txt
    field: text
    seq_len: 256
    num_tokens: 20000
    budget_kl: 0.05
    budget_perplexity_ratio: 1.03
"""


def data_files() -> dict[str, bytes]:
    """Path relative to the repository root -> the bytes that belong there."""
    texts = documents(CALIBRATION_SEED, CALIBRATION_CHARACTERS, held_out=False)
    calibration = _jsonl([{"text": text} for text in texts])
    held_out = "\n\n".join(documents(HELD_OUT_SEED, HELD_OUT_CHARACTERS, held_out=True)) + "\n"
    files = {
        "calibration/tiny.jsonl": calibration,
        "calibration/tiny.yaml": CALIBRATION_YAML.format(sha256=hashlib.sha256(calibration).hexdigest()).encode(),
        "eval/data/tiny_heldout.txt": held_out.encode(),
        "eval/suites/tiny.yaml": _suite().encode(),
    }
    for task in TASKS:
        files |= _task_files(task)
    return files


def _task_files(task: Task) -> dict[str, bytes]:
    return {
        f"eval/data/{task.name}.jsonl": _jsonl(items(task)),
        f"eval/tasks/{task.name}.yaml": TASK_YAML.format(name=task.name, description=task.description).encode(),
    }


def _suite() -> str:
    return SUITE_HEAD + "".join(SUITE_TASK.format(name=task.name) for task in TASKS) + SUITE_TEXTS


def _jsonl(rows: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
