"""The verbs of Python: what they take, what they give back, and that a call changes nothing in the process."""

from __future__ import annotations

import inspect
import logging
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.api import tools, verbs
from llmcompress.config.options import leaves
from llmcompress.config.stage import STAGES, stage
from llmcompress.console import Bars, Lines, Silent, quiet, watched
from llmcompress.pipeline import run as pipeline
from tests import tiny_models

RTN = {"method": "rtn", "group_size": 32, "format": "compressed_tensors"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.save(tmp_path_factory.mktemp("api") / "model", tiny_models.configs()["llama"])
    tiny_models.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(model: Path) -> Any:
    return lc.quantize(model, model.parent / "out", **RTN)


def test_a_transform_gives_an_artifact(artifact: Any, model: Path) -> None:
    assert isinstance(artifact, lc.Artifact) and not artifact.failures
    assert artifact.folder == model.parent / "out" and artifact.report.stages[0].name == "quantize"
    assert str(artifact).startswith(str(artifact.folder)) and "linears" in artifact._repr_markdown_()
    assert artifact.card.startswith("---") and artifact._repr_html_().startswith("<pre>")
    assert lc.load(artifact).report == lc.load(artifact.folder).report


def test_an_artifact_loads_as_a_model(artifact: Any) -> None:
    loaded = artifact.load()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 96)


def test_an_artifact_that_does_not_load_is_an_error(artifact: Any, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(artifact.folder, broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(lc.LLMCompressError, match="transformers cannot load it"):
        lc.load(broken).load()


def test_several_layouts_are_artifacts_of_their_own(model: Path, tmp_path: Path) -> None:
    settings = RTN | {"format": ["gptq", "compressed_tensors"]}
    made = lc.run({"model": str(model), "output": str(tmp_path / "both"), "stages": [{"quantize": settings}]})
    assert list(made.layouts) == ["gptq", "compressed_tensors"]
    assert made.folder == made.layouts["gptq"].folder == tmp_path / "both" / "gptq"


def test_checks_give_rows(artifact: Any) -> None:
    checks = lc.verify(artifact, forward=False)
    assert checks[0].name == "files" and checks.passed and checks.report.checks == list(checks)
    (verdict,) = lc.check(artifact, engine="transformers")
    assert verdict.loads
    assert isinstance(lc.card(artifact), lc.Artifact)
    assert {row["file"] for row in lc.reproduce(artifact)} == {"model.safetensors", "config.json"}


def test_a_broken_checkpoint_fails_and_says_why(artifact: Any, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(artifact.folder, broken)
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    checks = lc.verify(broken, forward=False)
    assert not checks.passed and "check files: model.safetensors has changed" in checks.failures[0]


def test_a_checkpoint_of_others_is_checked_and_not_written_to(model: Path) -> None:
    before = sorted(model.rglob("*"))
    assert len(lc.check(model)) > 1
    with pytest.raises(lc.LLMCompressError, match="its source is not known"):
        lc.evaluate(model, suite="tiny")
    assert sorted(model.rglob("*")) == before


@pytest.mark.parametrize("kind", ["checkpoint", "loaded"])
def test_a_model_may_be_opened_or_loaded(kind: str, model: Path, tmp_path: Path, artifact: Any) -> None:
    from transformers import AutoModelForCausalLM

    given = lc.Checkpoint.open(model) if kind == "checkpoint" else AutoModelForCausalLM.from_pretrained(model)
    before = {name: value.clone() for name, value in given.state_dict().items()} if kind == "loaded" else {}
    made = lc.quantize(given, tmp_path / "out", **RTN)
    assert made.report.output.digests == artifact.report.output.digests and not made.failures
    assert made.report.source.name == made.report.recipe["model"] == str(model)
    assert lc.load(made).report.source.name == str(model) and "llmcompress-model-" not in made.card
    assert all(torch.equal(before[name], value) for name, value in (given.state_dict() if before else {}).items())


def test_a_loaded_model_without_a_tokenizer_asks_for_one(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.name_or_path = ""
    with pytest.raises(lc.LLMCompressError, match="no tokenizer") as caught:
        lc.quantize(loaded, tmp_path / "out", **RTN)
    assert caught.value.hint == "pass tokenizer="
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = lc.quantize(loaded, tmp_path / "out", tokenizer=tokenizer, **RTN)
    assert made.report.source.name == "LlamaForCausalLM"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lc.LLMCompressError, match="a int is none"):
        lc.quantize(7, tmp_path / "out")


@pytest.mark.parametrize(("keyword", "meant"), [("schem", "scheme"), ("overwrit", "overwrite"), ("sed", "seed")])
def test_a_keyword_with_a_typo_is_named_with_the_nearest(keyword: str, meant: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(lc.LLMCompressError, match=f"unknown option '{keyword}'") as caught:
        lc.quantize(model, tmp_path / "out", **{keyword: 1})
    assert caught.value.hint == f"did you mean '{meant}'?"
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_process_is_changed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    called: list[str] = []
    monkeypatch.setattr("llmcompress.memory._of_c", lambda name: called.append(name))
    monkeypatch.setattr("llmcompress.pipeline.run.run", _drawing(pipeline.run))
    names = ["", "transformers", "datasets", "llmcompress", "torch"]

    def state() -> tuple[Any, ...]:
        numpy_state = np.random.get_state()
        return (
            random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.random.get_rng_state().tolist(),
            {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
            {name: (logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in names},
            vars(tqdm.tqdm)["__init__"], sys.excepthook, torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
        )  # fmt: skip

    before = state()
    lc.quantize(model, tmp_path / "out", **RTN)
    assert state() == before
    assert "mallopt" not in called, "malloc_trim alone, which sets nothing"


def _drawing(run: Any) -> Any:
    def drawn(*args: Any, **kwargs: Any) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        return run(*args, **kwargs)

    return drawn


def test_other_libraries_bars_are_silent_and_come_back() -> None:
    import tqdm
    import transformers.utils.logging as switch

    own = tqdm.tqdm
    with quiet("transformers", "datasets"):
        assert not switch.is_progress_bar_enabled() and tqdm.tqdm is own
        assert logging.getLogger("transformers").level == logging.ERROR
    assert switch.is_progress_bar_enabled() and logging.getLogger("transformers").level != logging.ERROR


def test_a_librarys_own_tqdm_is_silent_within_alone() -> None:
    import lm_eval.api.model as module
    import tqdm

    with quiet("lm_eval"):
        assert module.tqdm([1], disable=False).disable
        assert not tqdm.tqdm([1], disable=False, file=open("/dev/null", "w")).disable  # noqa: PTH123, SIM115
    assert module.tqdm is tqdm.tqdm


def test_progress_is_on_where_a_person_watches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert isinstance(watched(None), Silent) and isinstance(watched(False), Silent)
    assert isinstance(watched(True), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(watched(None), Bars)
    own = Silent()
    assert watched(own) is own
    with caplog.at_level(logging.INFO, logger="llmcompress"):
        own.message("reading")
    assert caplog.messages == ["reading"]


@pytest.mark.parametrize("name", STAGES)
def test_a_verb_has_the_signature_of_its_settings(name: str) -> None:
    function = verbs.verb(name)
    parameters = inspect.signature(function).parameters
    assert {leaf.name for leaf in leaves(stage(name).Settings)} <= parameters.keys()
    assert ("out" in parameters) == (stage(name).kind == "transform") and "progress" in parameters
    assert function.__name__ == name and stage(name).help in str(function.__doc__)
    assert inspect.signature(getattr(lc, name)) == inspect.signature(function)


def test_run_takes_a_mapping_a_recipe_and_overrides(model: Path, tmp_path: Path) -> None:
    data = {"model": str(model), "output": "elsewhere", "stages": [{"quantize": RTN}]}
    made = lc.run(data, f"output={tmp_path / 'out'}", "quantize.scheme=W8A16")
    assert made.report.linears[0].scheme == "int8 g32 sym" and made.folder == tmp_path / "out"
    again = lc.run(lc.Recipe.of(data, [f"output={tmp_path / 'out'}", "quantize.scheme=W8A16"]))
    assert again.report.stages[0].status == "reused"
    with pytest.raises(lc.LLMCompressError, match="unknown recipe"):
        lc.run("quickstrat")


def test_plan_says_what_it_takes(model: Path) -> None:
    plan = lc.plan(model, scheme="W3A16", group_size=32)
    assert plan.details.layers == 2 and "int3 g32 sym" in str(plan)
    with pytest.raises(lc.LLMCompressError, match="unknown option"):
        lc.plan(model, scheem="W3A16")


def test_tables_of_what_there_is() -> None:
    assert {"quickstart", "w4a16-gptq"} <= {row["recipe"] for row in lc.recipes()}
    grids = {row["grid"]: row for row in lc.methods()["grids"]}
    assert grids["nf4 b64"] == {"scheme": "NF4", "grid": "nf4 b64", "bitsandbytes": "yes", "compressed_tensors": "no", "gptq": "no"}  # fmt: skip
    assert grids["int3 g128 sym"]["gptq"] == "no" and grids["int4 g128 sym"]["gptq"] == "yes"
    assert str(lc.methods()).count("\n\n") == 2 and "<h4>grids</h4>" in lc.methods()._repr_html_()


def test_compare_sets_versions_side_by_side(artifact: Any, model: Path, tmp_path: Path) -> None:
    stages = [{"quantize": RTN | {"scheme": "W8A16"}}]
    other = lc.run({"model": str(model), "output": str(tmp_path / "w8"), "stages": stages})
    rows = lc.compare(artifact, other, html=tmp_path / "page.html")
    assert len(rows) == 2 and rows.note["base"] == "model" and (tmp_path / "page.html").is_file()
    assert tools.push_plan(artifact, "user/name").repo_id == "user/name"
