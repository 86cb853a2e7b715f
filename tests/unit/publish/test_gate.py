"""The gate: each reason not to push, one at a time, and that nothing else is said."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.card.metadata import Benchmark, as_text, eval_results
from llmcompress.errors import LLMCompressError
from llmcompress.publish.contents import CHUNK_BYTES, File
from llmcompress.publish.gate import card_problems
from llmcompress.publish.push import plan, push
from llmcompress.publish.secrets import secret_in
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


def license(name: str | None) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        report = RunReport.load(out)
        assert report.source is not None
        report.source.license = name
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
    (out / "merges.txt").write_text("HF_TOKEN=hf_" + "a1B2" * 8)


def a_log(out: Path) -> None:
    (out / "train.log").write_text("loss 3.1")


def checkpoints(out: Path) -> None:
    (out / "checkpoint-5").mkdir()
    for name in ("optimizer.pt", "rng_state.pth"):
        (out / "checkpoint-5" / name).write_bytes(b"x")


def a_link(target: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / "merges.txt").symlink_to(target)

    return change


def a_linked_folder(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    (out.parent / "elsewhere" / "scores.png").write_bytes(b"x")
    shutil.rmtree(out / "llmcompress" / "figures")
    (out / "llmcompress" / "figures").symlink_to(out.parent / "elsewhere")


def a_pipe(out: Path) -> None:
    os.mkfifo(out / "merges.txt")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unverified, "was not verified"),
        (failed_check, "check logits failed: too far"),
        (without_logits, "not verified in full (not run: logits)"),
        (changed_weights, "model.safetensors: is not the file that was verified"),
        (failed_stage, "stage verify failed: interrupted"),
        (license("cc-by-nc-nd-4.0"), "cc-by-nc-nd-4.0: forbids sharing a changed version"),
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
        (a_secret, "merges.txt: holds what looks like a secret (Hugging Face access token)"),
        (a_log, "train.log: is no file of a checkpoint that a push knows"),
        (checkpoints, "checkpoint-5/ (2 files): is no file of a checkpoint"),
        (a_link("/etc/hostname"), "merges.txt: is a link"),
        (a_link("config.json"), "merges.txt: is a link"),
        (a_link("no_such_file"), "merges.txt: is a link"),
        (a_linked_folder, "llmcompress/figures: is a link"),
        (a_pipe, "merges.txt: is no plain file"),
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
    for spoil in (failed_check, changed_weights, license("cc-by-nd-4.0"), no_card, a_secret):
        spoil(out)
    assert len(refusals(out)) == 5


def test_no_licence_is_a_note_in_private_and_a_reason_in_public(out: Path) -> None:
    license(None)(out)
    assert refusals(out) == [] and "states no license" in plan(out, "me/small", public=False).findings.warnings[-1]
    assert refusals(out, public=True) == ["the original states no license, so nothing allows sharing it"]


@pytest.mark.parametrize("name", ["small", "me/", "/small", "me/a b", "me/a--b", "me/small.", "../small", "a/b/c"])
def test_a_name_that_is_none(name: str, out: Path) -> None:
    with pytest.raises(LLMCompressError, match="no repository name"):
        plan(out, name, public=False)


def test_hidden_files_and_scratch_stay_here_and_it_is_said(out: Path) -> None:
    (out / ".env").write_text("x")
    (out / "README.tmp").write_text("x")
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("x")
    planned = plan(out, "me/small", public=False)
    assert not {".env", "README.tmp", ".git/config"} & {file.name for file in planned.files}
    assert not planned.findings.refusals
    assert planned.findings.warnings[0] == "stays here: .env, .git/ (1 file), README.tmp"


STRANGERS = ("id_rsa", "api_key", "optimizer.pt", "pytorch_model.bin", "evil.py", "train.log", "notes.md", "other.safetensors",
             "llmcompress/cache.json", "llmcompress/figures/deep/x.png", "sub/config.json", "wandb/run/config.json")  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_known_is_refused_by_name_and_goes_where_it_is_asked_for(name: str, out: Path) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_bytes(b"\0\1")
    planned = plan(out, "me/small", public=False)
    assert name not in {file.name for file in planned.files} and len(planned.findings.refusals) == 1
    assert name.partition("/")[0] in planned.findings.refusals[0].message
    asked = plan(out, "me/small", public=False, include=[name])
    assert name in {file.name for file in asked.files} and not asked.findings.refusals
    with_pattern = plan(out, "me/small", public=False, include=[f"{name.partition('/')[0]}*"])
    assert name in {file.name for file in with_pattern.files}


def test_what_goes_in_no_repository_goes_with_no_pattern(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "config").write_text("x")
    (out / "key").symlink_to("/etc/hostname")
    (out / "a\nb").write_text("x")
    planned = plan(out, "me/small", public=False, include=["*", ".git/*"])
    assert {".git/config", "key", "a\nb"}.isdisjoint(file.name for file in planned.files)
    assert len(planned.findings.refusals) == 3


def test_a_pattern_without_a_file_is_an_error(out: Path) -> None:
    found = plan(out, "me/small", public=False, include=["*.gguf"]).findings
    assert [error.message for error in found.refusals] == [f"--include *.gguf: matches no file of {out}"]


SECRETS = {
    "private key": ["-----BEGIN OPENSSH PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN PGP PRIVATE KEY BLOCK-----", "-----BEGIN PRIVATE KEY-----"],
    "Hugging Face access token": ["hf_" + "aB3" * 10],
    "API key": ["sk-" + "aB3x" * 8, "sk-proj-" + "aB3x" * 10, "sk-ant-api03-" + "a-B3x_" * 10 + "x" * 20, "sk-" + "abcdefgh" * 4],
    "cloud key": ["AKIA" + "A1B2" * 4, "AIza" + "a1-B_" * 7, "aws_secret_access_key = " + "aB3/" * 10, "AccountKey=" + "aB3+" * 21 + "aB=="],
    "repository token": ["ghp_" + "aB3" * 12, "github_pat_" + "aB3_" * 15, "glpat-" + "aB3-" * 6],
    "service token": ["xoxb-" + "1234-" * 5, "sk_live_" + "aB3" * 8],
    "signed token": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"],
    "bearer token": ["Authorization: Bearer " + "aB3." * 10, '"authorization": "bearer ' + "aB3." * 10],
    "password in an address": ["https://me:secret-word@example.org/x"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "secret"), [(kind, text) for kind, texts in SECRETS.items() for text in texts])
def test_secrets_are_found_wherever_they_lie(kind: str, secret: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for place in (0, 100, CHUNK_BYTES - 3, CHUNK_BYTES - len(secret) // 2, 2 * CHUNK_BYTES - 20):
        path.write_bytes(b"x\n" * (place // 2) + b" " * (place % 2) + secret.encode() + b"\n" + b"y z " * 30_000)
        assert secret_in(File("file.json", path)) == kind, place
    path.write_bytes(secret.encode("utf-16"))
    assert secret_in(File("file.json", path)) == kind
    header = json.dumps({"__metadata__": {"note": secret}}).replace('\\"', '"').encode()
    assert secret_in(File("x.safetensors", len(header).to_bytes(8, "little") + header + bytes(100))) == kind


def test_what_only_looks_like_one_is_none(tmp_path: Path) -> None:
    from tests import tiny_models

    tiny_models.save_tokenizer(tmp_path)
    texts = ["hf_hub_download(repo_id)", "sk-learn", "risk-adjusted-returns-of-2024-and-2025", "Authorization: Bearer $KEY", "AKIA",
             "-----BEGIN PUBLIC KEY-----", "https://example.org/a:b", "sk-" + "-" * 40, "a" * 64, "HF_TOKEN=$TOKEN", "USER:PASSWORD"]  # fmt: skip
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    for path in tmp_path.iterdir():
        assert secret_in(File(path.name, path)) is None, path.read_text()[:100]


def test_a_large_file_is_searched_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    with path.open("wb") as file:
        for _ in range(24):
            file.write(b"word and word\n" * 80_000)
        file.write(b"hf_" + b"aB3" * 10)
    tracemalloc.start()
    assert secret_in(File("vocab.txt", path)) == "Hugging Face access token"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * CHUNK_BYTES < path.stat().st_size


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
