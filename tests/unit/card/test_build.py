"""The card as a whole: drawn from the report alone, the same every time, and honest about what is missing."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from llmcompress.card.build import write_card
from llmcompress.card.stages import Card, CardSettings
from llmcompress.card.view import placeholder, title
from llmcompress.errors import LLMCompressError
from llmcompress.report import Check, Finding, Measurement, RunReport, Speed, StageRow
from tests.unit.card.sample_report import SECRET, full_report, minimal_report

LAYOUTS = ("gptq", "compressed_tensors", "bitsandbytes")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w])")


def draw(report: RunReport, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder)
    return write_card(folder).read_text(encoding="utf-8")


def body(card: str) -> str:
    """The card without its front matter."""
    return card.split("---\n", 2)[2]


def tokens(card: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(body(card))


def tables(card: str) -> Iterator[list[list[str]]]:
    """Every table as rows of cells, as a Markdown reader sees them."""
    rows: list[list[str]] = []
    inside = False
    for token in tokens(card):
        if token.type == "table_open":
            rows, inside = [], True
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and inside:
            rows[-1].append(token.content)
        elif token.type == "table_close":
            inside = False
            yield rows


def numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, dict):
        for one in value.values():
            yield from numbers_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from numbers_in(one)


def derived(report: RunReport) -> Iterator[float]:
    """Every figure that the card may compute from others; nothing else may be printed."""
    source, output = report.source, report.output
    assert source and output
    before = 8 * source.weights_bytes / source.num_parameters
    yield from (before, 100 * output.weights_bytes / source.weights_bytes)
    yield 100 * output.bits_per_weight_model / before
    yield 100 * output.quantized_parameters / output.total_parameters
    for row in report.evaluations[0].texts:
        yield from (row.compressed_perplexity / row.baseline_perplexity, 100 * row.top1_agreement)
    for size in (source.weights_bytes, output.weights_bytes, *(row.peak_memory_bytes for row in report.stages)):
        yield from (size / 1e6, size / 1e3)
    for task in report.evaluations[0].tasks:
        yield from (100 * one for one in (task.difference, *task.interval, task.baseline.value, task.compressed.value))
    yield float(len(report.linears))
    outcomes = [row.outcome for row in report.linears]
    yield from map(float, map(outcomes.count, outcomes))
    kinds = [(re.sub(r"\d+", "*", row.name), row.method) for row in report.linears]
    yield from map(float, map(kinds.count, kinds))
    yield from (float(found) for row in report.linears for found in re.findall(r"\d+", row.name))
    yield 0.0001  # "p < 0.0001"
    yield 0.05  # "significant (p < 0.05)"
    yield sum((row.mcnemar_p or 1) < 0.05 for row in report.evaluations[0].tasks)
    yield from (len(report.evaluations[0].tasks), sum(check.passed for check in report.checks), len(report.checks))
    yield 95.0  # the level of the intervals
    yield from (0.01, 1.0)  # "0.01 means that 1 % of the output's energy is error"
    yield from (13.0, 100.0)  # words of a run that counts as seen


@pytest.mark.parametrize("seed", range(8))
def test_every_number_on_the_card_is_in_the_report(tmp_path: Path, seed: int) -> None:
    """Each number printed is a rounding, to the digits shown, of a number of the report or of one derived from it."""
    report = full_report(LAYOUTS[seed % 3], seed)
    data = report.model_dump(mode="json")
    known = [*numbers_in(data), *derived(report)]
    strings = json.dumps(data)
    prose = re.sub(r"```.*?```", "", body(draw(report, tmp_path)), flags=re.S)
    prose = re.sub(r"`[^`]*`", "", prose).replace("not 0/1", "")
    assert len(NUMBER.findall(prose)) > 100
    for printed in NUMBER.findall(prose):
        text = printed.replace(",", "")
        value = float(text)
        mantissa, _, exponent = text.partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        half = 0.5 * 10.0**-decimals
        close = any(min(abs(value - one), abs(value + one)) <= half * 1.001 for one in known)
        assert close or f"{printed}" in strings, f"{printed} is not in the report"


def test_scores_are_traced_row_by_row(tmp_path: Path) -> None:
    report = full_report()
    header, *rows = next(rows for rows in tables(draw(report, tmp_path)) if rows[0][0] == "task")
    assert header[1:] == ["base", "this checkpoint", "difference [95 % interval]", "flips", "McNemar p", "verdict"]
    for cells, task in zip(rows, report.evaluations[0].tasks, strict=True):
        assert task.task in cells[0]
        assert f"{task.num_items} items" in cells[0]
        base, compressed = (float(cell.split(" ± ")[0]) for cell in cells[1:3])
        assert (base, compressed) == pytest.approx((task.baseline.value, task.compressed.value), abs=5.1e-5)
        shown = [float(one) for one in re.findall(r"[+-]?\d\.\d+", cells[3])]
        assert shown == pytest.approx([task.difference, *task.interval], abs=5.1e-5)
        assert cells[4] == f"{task.better} / {task.worse}"
        assert task.verdict in cells[6]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_report_same_bytes(tmp_path: Path, layout: str) -> None:
    folders = [tmp_path / place / "model" for place in ("a", "b")]
    for folder in folders:
        draw(full_report(layout), folder)
    for name in ("README.md", "llmcompress/figures/scores.png", "llmcompress/figures/errors.png"):
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second


def test_drawing_again_changes_nothing_although_the_card_stage_is_now_in_the_report(tmp_path: Path) -> None:
    report = full_report()
    report.stages = [row for row in report.stages if row.name != "card"]
    before = draw(report, tmp_path)
    row = StageRow(name="card", key="k", status="done", seconds=1.5, peak_memory_bytes=1)
    report.stages = [one.model_copy(update={"status": "reused"}) for one in report.stages] + [row]
    assert draw(report, tmp_path) == before


def test_nothing_is_left_beside_the_card(tmp_path: Path) -> None:
    draw(full_report(), tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    figures = {"llmcompress/figures/scores.png", "llmcompress/figures/errors.png"}
    assert files == {"README.md", "llmcompress/report.json"} | figures


def test_figures_go_when_there_is_nothing_left_to_draw(tmp_path: Path) -> None:
    assert "scores.png" in draw(full_report(), tmp_path)
    card = draw(minimal_report(), tmp_path)
    assert ".png" not in card
    assert not list(tmp_path.rglob("*.png"))


def test_missing_parts_are_said(tmp_path: Path) -> None:
    card = draw(minimal_report(), tmp_path)
    for said in (
        "Nothing was evaluated",
        "holds no sizes",
        "no compressed checkpoint",
        "holds no recipe",
        "No check was run",
        "no row on any linear",
        "How long it took was not recorded",
    ):
        assert said in card
    assert [rows[0][0] for rows in tables(card)] == ["software"]


def test_a_quantized_checkpoint_that_was_not_evaluated_says_so_at_once(tmp_path: Path) -> None:
    report = full_report().model_copy(update={"evaluations": [], "checks": [], "calibration": None})
    card = draw(report, tmp_path)
    assert "| **lost** | **not measured** |" in card.split("## ")[0]
    assert "chosen from the weights alone" in card
    assert not any(rows[0][0] == "task" for rows in tables(card))
    assert "model-index" not in card


def test_failures_are_limits(tmp_path: Path) -> None:
    report = full_report()
    report.checks[0] = report.checks[0].model_copy(update={"passed": False, "detail": "model.safetensors has changed"})
    report.stages[2] = report.stages[2].model_copy(update={"status": "failed", "error": "no space left"})
    limits = draw(report, tmp_path).split("## Limits")[1]
    assert "Check `files` failed" in limits
    assert "model.safetensors has changed" in limits
    assert "Stage `evaluate` failed" in limits
    assert "lost more than the budget" in limits
    assert "the tokenizer adds no first token" in limits


def test_an_engine_that_was_not_there_is_a_limit(tmp_path: Path) -> None:
    report = full_report("gptq")
    why = "optimum and GPTQModel are not installed"
    report.checks.append(Check(name="engine", passed=True, ran=False, detail=why))
    report.evaluations[0].kernels = "dequantized"
    limits = draw(report, tmp_path).split("## Limits")[1]
    assert f"Check `engine` was not run: {why}." in limits
    assert "The scores of `tiny` are those of its dequantized weights" in limits
    report.evaluations[0].kernels = "native"
    report.evaluations[0].engine_note = "our dequantized weights"
    assert "are those of its dequantized" not in draw(report, tmp_path), "the field decides, not the words of the note"


def test_every_exception_is_named_with_its_reason(tmp_path: Path) -> None:
    report = full_report()
    rows = next(rows for rows in tables(draw(report, tmp_path)) if rows[0][0] == "linear")
    assert rows[1] == [
        "`model.layers.*.mlp.down_proj`",
        "5",
        "256 x 768",
        "fell back to `rtn`",
        "its Hessian is singular",
    ]
    assert rows[2][0] == "`lm_head`"
    assert rows[2][3:] == ["not quantized", "outside the decoder layers"]


def test_another_baseline_than_the_original_is_said(tmp_path: Path) -> None:
    report = full_report()
    report.evaluations[0] = report.evaluations[0].model_copy(update={"baseline": "e" * 64})
    assert "Base is **not** the checkpoint named above" in draw(report, tmp_path)


def test_a_suite_without_budgets_has_no_verdict(tmp_path: Path) -> None:
    report = full_report()
    text = report.evaluations[0].texts[0].model_copy(deep=True)
    for figure in text.metrics:
        figure.budget = None
    report.evaluations[0] = report.evaluations[0].model_copy(update={"tasks": [], "texts": [text], "verdict": "pass"})
    card = draw(report, tmp_path)
    assert "Suite `tiny`: no budget was set" in card
    assert "The suite ran no task" in card
    assert "pass" not in body(card).split("## How to run")[0].replace("passed", "")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_local_path_reaches_the_card(tmp_path: Path, layout: str) -> None:
    report = full_report(layout, local=True)
    report.evaluations[0] = report.evaluations[0].model_copy(
        update={"engine_note": f"gptq refused it (OSError: {SECRET}/model.safetensors is odd; see /opt/x/y.py)"}
    )
    report.notes.append("read ~/models/base and C:\\Users\\me\\w.bin, ../texts/stories.txt and file:///srv/z")
    card = draw(report, tmp_path)
    for part in ("somebody", "private", "/opt", "~/", "C:\\", "Users", "../", "/srv", str(tmp_path)):
        assert part not in card
    assert "`base-model`" in card
    assert "calibration: stories.txt" in card
    assert "output: tiny-w4" in card
    assert "revision: refs/pr/1" in card


def test_odd_names_keep_tables_whole(tmp_path: Path) -> None:
    report = full_report()
    odd = "a|b`c*d_e\n<x> [y](z) $q$ \\|"
    evaluation = report.evaluations[0]
    tasks = [evaluation.tasks[0].model_copy(update={"task": odd, "metric": odd})]
    texts = [evaluation.texts[0].model_copy(update={"name": odd})]
    report.evaluations[0] = evaluation.model_copy(update={"tasks": tasks, "texts": texts, "suite": odd})
    report.linears[-1] = report.linears[-1].model_copy(update={"name": odd, "reason": odd, "notes": [odd]})
    report.checks[0] = report.checks[0].model_copy(update={"name": odd, "detail": odd})
    report.recipe["stages"][0]["quantize"]["ignore"] = ["```", odd]
    plain = draw(full_report(), tmp_path / "plain")
    report.card.title = "odd|na`me"
    card = draw(report, tmp_path / "odd")
    shape = [(len(rows), {len(row) for row in rows}) for rows in tables(card) if rows[0][0] != "task"]
    expected = [(len(rows), {len(row) for row in rows}) for rows in tables(plain) if rows[0][0] != "task"]
    assert shape == expected
    assert all(len(widths) == 1 for _, widths in shape)
    headings = [token.map for token in tokens(card) if token.type == "heading_open"]
    assert len(headings) == len([token for token in tokens(plain) if token.type == "heading_open"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_code_is_code(tmp_path: Path, layout: str) -> None:
    report = full_report(layout)
    report.recipe["trust_remote_code"] = True
    report.card.title = 'we ird"name'
    card = draw(report, tmp_path)
    blocks = {token.info: token.content for token in tokens(card) if token.type == "fence"}
    ast.parse(blocks["python"])
    assert "trust_remote_code=True" in blocks["python"]
    assert '"USER/we-ird-name"' in blocks["python"]
    packages = {"gptq": "optimum gptqmodel", "compressed_tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
    assert f"accelerate {packages[layout]}\n" in card
    assert ("vllm serve USER/we-ird-name --trust-remote-code" in card) == (layout != "bitsandbytes")
    assert ("**vLLM 0.33.0** (by the rules of its loader)" in card) == (layout != "bitsandbytes")
    assert ("- vLLM 0.33.0: no loader any more" in card) == (layout == "bitsandbytes")


def test_only_engines_that_passed_are_shown(tmp_path: Path) -> None:
    report = full_report("gptq")
    for verdict in report.engines:
        verdict.loads = verdict.engine == "vllm"
        verdict.findings = [] if verdict.loads else [Finding(rule="r", level="refuses", detail="because", source="s")]
    section = draw(report, tmp_path / "one").split("## How to run it")[1].split("## ")[0]
    assert "vllm serve" in section and "pipeline" not in section and "- transformers 5.23.0: because" in section
    report.engines = []
    assert "`llmcompress check` does" in draw(report, tmp_path / "none").split("## How to run it")[1].split("## ")[0]


def test_an_engine_that_was_loaded_says_so_and_stands_first(tmp_path: Path) -> None:
    report = full_report("compressed_tensors")
    report.checks.append(Check(name="engine", passed=True, detail="compared"))
    section = draw(report, tmp_path).split("## How to run it")[1].split("## ")[0]
    assert "**transformers 5.23.0** (loaded and compared, on this machine)" in section
    assert section.index("transformers 5.23.0") < section.index("vLLM 0.33.0")


def test_a_check_that_could_not_be_run_is_neither_passed_nor_failed(tmp_path: Path) -> None:
    report = full_report()
    report.checks.append(Check(name="engine", passed=True, ran=False, detail="not installed"))
    card = draw(report, tmp_path)
    assert "| engine | not run | not installed |" in card and "not run: engine" in card.split("## ")[0]


def test_the_title_is_the_base_and_its_scheme(tmp_path: Path) -> None:
    assert title(full_report("gptq")) == "base-model W4A16" and placeholder(full_report()) == "USER/base-model-W4A16"
    assert title(full_report("bitsandbytes", local=True)) == "base-model NF4"
    assert title(minimal_report()) == "Model"
    assert draw(full_report(), tmp_path).split("---\n", 2)[2].strip().startswith("# base-model W4A16\n")


def test_what_the_user_declares_goes_into_the_report_and_stays(tmp_path: Path) -> None:
    report = full_report(local=True)
    report.output = report.output and report.output.model_copy(update={"files": {}})
    report.save(tmp_path)
    declared = {"title": "My model", "base_model": "org/base", "license": "mit", "tags": ["legal"]}
    work = SimpleNamespace(report=report, out=tmp_path)
    for settings in (declared, {}):
        Card().run(CardSettings.model_validate(settings), work)  # type: ignore[arg-type]
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert RunReport.load(tmp_path).card.model_dump() == declared
        for part in (
            "# My model",
            "base_model: org/base",
            "license: mit",
            "- legal",
            "(https://huggingface.co/org/base)",
        ):
            assert part in card
        assert "The base is not linked" not in card


def test_what_was_lost_most_leads(tmp_path: Path) -> None:
    report = full_report()
    text = report.evaluations[0].texts[0]
    top = draw(report, tmp_path).split("## ")[0]
    assert top.index("**`tiny_facts` acc") < top.index("`heldout` perplexity")
    perplexity = text.figure("perplexity")
    perplexity.baseline, perplexity.compressed, perplexity.value = 26.87, 32.11, 32.11 / 26.87
    lost = next(line for line in draw(report, tmp_path).splitlines() if line.startswith("| **lost**"))
    assert lost.startswith("| **lost** (`tiny`) | **`heldout` perplexity 26.87 to 32.11 (1.20 x)**; `tiny_facts` acc 9")
    assert "-4.6 points [-6.5, -2.7]" in lost


def test_a_chat_model_is_shown_a_chat(tmp_path: Path) -> None:
    report = full_report("compressed_tensors")
    assert report.source is not None and "Once upon a time" in draw(report, tmp_path)
    report.source.chat_template = True
    card = draw(report, tmp_path)
    assert '[{"role": "user", "content": ' in card and "Once upon" not in card


def test_models_measured_in_different_dtypes_say_so_at_once(tmp_path: Path) -> None:
    report = full_report()
    common = {"engine": "transformers", "engine_note": "-", "device": "cpu", "load_s": 1.0}
    common |= {"memory_before_load_bytes": 1, "peak_memory_bytes": 2}
    speeds = {"prefill_tokens_per_s": [1.0], "decode_tokens_per_s": [2.0]}
    rows = [
        Speed.model_validate(common | speeds | {"model": model, "dtype": dtype})
        for model, dtype in (("baseline", "float32"), ("compressed", "bfloat16"))
    ]
    report.speed = Measurement(
        baseline="b", prompt_tokens=1, new_tokens=1, batch_size=1, num_threads=1, hardware="a CPU", rows=rows
    )
    assert "| **run unlike** | float32 on cpu | bfloat16 on cpu | not alike |" in draw(report, tmp_path)
    rows[0].dtype = "bfloat16"
    assert "run unlike" not in draw(report, tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LLMCompressError, match="not found"):
        write_card(tmp_path)
