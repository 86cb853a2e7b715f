"""The gate: each reason not to push, one at a time, and that nothing else is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.card.metadata import Benchmark, as_text, eval_results
from llmcompress.errors import LLMCompressError
from llmcompress.publish.gate import card_problems
from llmcompress.publish.push import plan, push
from llmcompress.report import RunReport
from tests.unit.card.sample_report import full_report
from tests.unit.publish.conftest import change_report


def refusals(out: Path, *, public: bool = False) -> list[str]:
    return [error.message for error in plan(out, "me/small", public=public).findings.refusals]


def test_a_verified_folder_passes_with_what_should_be_known(out: Path) -> None:
    found = plan(out, "me/small", public=True).findings
    assert not found.refusals and found.warnings == ["nothing was evaluated: the card says so"]


def unverified(out: Path) -> None:
    report = RunReport.load(out)
    change_report(out, stages=[row for row in report.stages if row.name != "verify"])


def failed_check(out: Path) -> None:
    report = RunReport.load(out)
    report.checks[5].passed, report.checks[5].detail = False, "too far"
    report.save(out)


def without_logits(out: Path) -> None:
    report = RunReport.load(out)
    change_report(out, checks=[check for check in report.checks if check.name != "logits"])


def changed_weights(out: Path) -> None:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def failed_stage(out: Path) -> None:
    report = RunReport.load(out)
    report.stages[1].status, report.stages[1].error = "failed", "interrupted"
    report.save(out)


def licence(name: str | None) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        report = RunReport.load(out)
        assert report.source is not None
        report.source.licence = name
        report.save(out)

    return change


def edited(old: str, new: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        text = (out / "README.md").read_text()
        assert old in text
        (out / "README.md").write_text(text.replace(old, new, 1))

    return change


def no_card(out: Path) -> None:
    (out / "README.md").unlink()


def adapter_of(base: str | None) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))

    return change


def a_secret(out: Path) -> None:
    (out / "train.log").write_text("HF_TOKEN=hf_" + "a1B2" * 8)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unverified, "was not verified"),
        (failed_check, "check logits failed: too far"),
        (without_logits, "not verified in full (not run: logits)"),
        (changed_weights, "model.safetensors: is not the file that was verified"),
        (failed_stage, "stage verify failed: interrupted"),
        (licence("cc-by-nc-nd-4.0"), "cc-by-nc-nd-4.0: forbids sharing a changed version"),
        (no_card, "has no card"),
        (edited("library_name: transformers", "library_name: transformers\nbase_model: /home/me/models/x"), "base_model: '/home/me/models/x' is no Hub id"),
        (edited("library_name: transformers", "library_name:"), "library_name: is empty"),
        (edited("license: apache-2.0", "license: my-own"), "license: 'my-own' is not on the Hub's list"),
        (edited("## Limits", "## More\n\n## Limits"), "section 'More' is empty"),
        (edited("## Limits", "## More\n\n[More Information Needed]\n\n## Limits"), "placeholder"),
        (edited("## Limits", "| a | b |\n| --- | --- |\n| 1 | |\n\n## Limits"), "an empty cell"),
        (edited("## Limits", "It lies in /home/me/models/x here.\n\n## Limits"), "a path of this machine (/home/me/models/x)"),
        (edited("---\n", "--\n"), "no front matter"),
        (adapter_of("/home/me/models/x"), "names '/home/me/models/x' as its base, which is no Hub id"),
        (adapter_of("bundled/tiny"), "names 'bundled/tiny' as its base"),
        (adapter_of(None), "names None as its base"),
        (a_secret, "train.log: holds what looks like an access token"),
    ],
)  # fmt: skip
def test_each_reason_alone(spoil: Callable[[Path], None], said: str, out: Path) -> None:
    spoil(out)
    found = refusals(out)
    assert len(found) == 1 and said in found[0], found
    with pytest.raises(LLMCompressError):
        push(plan(out, "me/small", public=False), public=False)


def test_an_adapter_of_a_hub_checkpoint_passes_and_a_path_in_another_config_is_a_warning(out: Path) -> None:
    adapter_of("org/base")(out)
    (out / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/me/models/x"}))
    found = plan(out, "me/small", public=False).findings
    assert not found.refusals
    assert found.warnings[-1] == "tokenizer_config.json: shows a path of a machine (/home/me/models/x)"


def test_all_reasons_at_once(out: Path) -> None:
    for spoil in (failed_check, changed_weights, licence("cc-by-nd-4.0"), no_card, a_secret):
        spoil(out)
    assert len(refusals(out)) == 5


def test_no_licence_is_a_note_in_private_and_a_reason_in_public(out: Path) -> None:
    licence(None)(out)
    assert refusals(out) == [] and "states no licence" in plan(out, "me/small", public=False).findings.warnings[-1]
    assert refusals(out, public=True) == ["the original states no licence, so nothing allows sharing it"]


@pytest.mark.parametrize("name", ["small", "me/", "/small", "me/a b", "me/a--b", "me/small.", "../small", "a/b/c"])
def test_a_name_that_is_none(name: str, out: Path) -> None:
    with pytest.raises(LLMCompressError, match="no repository name"):
        plan(out, name, public=False)


def test_hidden_files_and_scratch_stay_here_and_links_out_are_refused(out: Path) -> None:
    (out / ".env").write_text("x")
    (out / "README.tmp").write_text("x")
    assert not {".env", "README.tmp"} & {file.name for file in plan(out, "me/small", public=False).files}
    (out / "host.txt").symlink_to("/etc/hostname")
    with pytest.raises(LLMCompressError, match="a link that leads out"):
        plan(out, "me/small", public=False)


def test_report_and_recipe_go_out_without_paths(out: Path) -> None:
    files = {file.name: file.content().decode() for file in plan(out, "me/small", public=False).files if file.is_text()}
    assert json.loads(files["llmcompress/report.json"])["recipe"]["output"] == "small-llama"
    assert str(out.parent) not in files["llmcompress/recipe.yaml"]


def test_pipes_and_code_in_a_card_are_no_empty_cells() -> None:
    front = as_text({"library_name": "transformers", "tags": ["x"]})
    assert (
        card_problems(front + "# T\n\n| a | b |\n| --- | ---: |\n| `x\\|y` | 1 |\n\n```bash\n# TODO\n## x\n```\n") == []
    )


def test_eval_results_only_where_all_of_it_matches() -> None:
    report = full_report()
    assert eval_results(report) == {}
    row = report.evaluations[0].tasks[0]
    row.hub_dataset, row.dataset_path = True, "org/benchmark"
    same = {"dataset_id": "org/benchmark", "task_id": "b", "task": row.task, "metric": row.metric, "num_fewshot": row.num_fewshot, "num_items": row.num_items}  # fmt: skip
    written = eval_results(report, (Benchmark(framework="lm-eval", **same),))
    assert list(written) == [".eval_results/b.yaml"]
    import yaml
    from huggingface_hub import parse_eval_result_entries

    entry = parse_eval_result_entries(yaml.safe_load(written[".eval_results/b.yaml"]))[0]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/benchmark", "b", row.compressed.value)
    for other in (
        {"num_fewshot": 99},
        {"num_items": 1},
        {"metric": "f1"},
        {"framework": "inspect-ai"},
        {"dataset_id": "org/x"},
    ):
        assert eval_results(report, (Benchmark(**({"framework": "lm-eval"} | same | other)),)) == {}
