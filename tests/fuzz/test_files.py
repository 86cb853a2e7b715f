"""Every file that somebody else may have written, broken in every way that a generator can think of.

What holds for all of them: it is read, or refused by an LLMCompressError of single lines; nothing else is raised, nothing
takes ten seconds, no file outside the folder is opened. A few dozen examples each in the default run, 10,000 with -m slow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from llmcompress import templates
from llmcompress.card.build import write_card
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import DTYPE_BYTES, read_header
from llmcompress.checkpoint.source import load_tokenizer, source_metadata
from llmcompress.checkpoint.writer import refuse_strangers
from llmcompress.config import recipe
from llmcompress.data import chat
from llmcompress.data.calibration_spec import CalibrationSpec
from llmcompress.data.sources import read_rows
from llmcompress.errors import LLMCompressError, collected, raise_all, shown
from llmcompress.evaluate.adapted import _named as base_name
from llmcompress.evaluate.provenance import texts_of
from llmcompress.evaluate.suite import load_suite
from llmcompress.evaluate.task_files import TaskFiles, code_problems
from llmcompress.finetune.adapter import Adapter
from llmcompress.pipeline.run import resumed_recipe
from llmcompress.publish.push import plan
from llmcompress.report import RunReport
from llmcompress.report.environment import describe
from llmcompress.templates import Renderer
from tests import tiny_models

Body = Callable[[Any, Path], object]

opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


# --- what broken files are made of ---

numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**63, 10**30, -1]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.just("8"),
)
names = st.one_of(
    st.sampled_from(["a", "b", "__metadata__", "", "../a", "x\x1b[2J", "\ud800", "n" * 300, "a\nb"]),
    st.text(max_size=8),
)
values: st.SearchStrategy[Any] = st.recursive(
    numbers | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def broken_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """`valid` with some bytes replaced, removed or put in, mostly near its start."""
    place = st.one_of(st.integers(0, min(200, len(valid))), st.integers(0, len(valid)))
    change = st.tuples(place, st.integers(0, 9), st.binary(max_size=9))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = valid
        for start, length, new in changes:
            data = data[:start] + new + data[start + length :]
        return data

    return st.lists(change, min_size=1, max_size=4).map(apply)


def broken_text(valid: str) -> st.SearchStrategy[bytes]:
    """The same for text, with pieces that mean something in YAML and JSON."""
    pieces = ["[" * 60, "{a: ", "&a ", "*a", "<<: *a\n", "!!python/object:x ", "- ", "\n", "9" * 6000, "2001-99-99", "---\n", "\t", "!!int x", "? ", "!!binary =", "\x00", "\ufeff", "*", "%", "no", "'", "!function os.system"]  # fmt: skip
    change = st.tuples(st.integers(0, len(valid)), st.integers(0, 5), st.sampled_from(pieces))

    def apply(changes: list[tuple[int, int, str]]) -> bytes:
        text = valid
        for start, length, new in changes:
            text = text[:start] + new + text[start + length :]
        return text.encode()

    return st.one_of(st.lists(change, min_size=1, max_size=4).map(apply), broken_bytes(valid.encode()))


# --- safetensors ---

entry = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*DTYPE_BYTES, "Q4", "", "f32"]) | values,
            "shape": st.lists(st.integers(0, 3) | numbers, max_size=3) | values,
            "data_offsets": st.lists(st.integers(0, 16) | numbers, min_size=2, max_size=2) | values,
        }
    ),
    values,
)
header = st.tuples(st.dictionaries(names, entry, max_size=3), st.integers(-9, 9), st.binary(max_size=24))


def headers(example: tuple[dict[str, Any], int, bytes], folder: Path) -> None:
    head, off, data = example
    text = json.dumps(head).encode()
    (folder / "a.safetensors").write_bytes(max(0, len(text) + off).to_bytes(8, "little") + text + data)
    accepted_by_the_library_too(folder / "a.safetensors")


SMALL_FILE = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.int8)})


def damaged(data: bytes, folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(data)
    accepted_by_the_library_too(folder / "b.safetensors")


def accepted_by_the_library_too(path: Path) -> None:
    """We may refuse more than the safetensors library does, and never less."""
    tensors = read_header(path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == tensor.shape
            assert sum(map(len, tensor.chunks())) == tensor.num_bytes


# --- checkpoints ---


def checkpoint(folder: Path) -> Path:
    """A small sharded checkpoint beside which lies what nobody may read."""
    path = folder / "model"
    if not path.exists():
        tiny_models.save(path, tiny_models.configs()["llama"], max_shard_size="100KB")
        (folder / "secret.safetensors").write_bytes(SMALL_FILE)
        (path / "out").symlink_to(folder)
        (path / "index.json").write_text((path / "model.safetensors.index.json").read_text())
        (path / "good.json").write_text((path / "config.json").read_text())
    for good, name in (("index.json", "model.safetensors.index.json"), ("good.json", "config.json")):
        (path / name).write_text((path / good).read_text())
    (path / "out").unlink(missing_ok=True)
    return path


shard = st.sampled_from(["../secret.safetensors", "/etc/passwd", "out/secret.safetensors", "", ".", "model.safetensors.index.json", "x" * 300, "a\x00b", "\ud800", "config.json"]) | values  # fmt: skip


def indexes(example: tuple[Any, bool], folder: Path) -> None:
    weight_map, whole = example
    path = checkpoint(folder)
    (path / "linked").unlink(missing_ok=True)
    (path / "linked").symlink_to(folder)
    index = json.loads((path / "index.json").read_text())
    if isinstance(weight_map, dict) and not whole:
        index["weight_map"] |= weight_map
    else:
        index["weight_map"] = weight_map
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    opened.clear()
    try:
        Checkpoint.open(path)
    finally:
        assert not any("secret" in name or "passwd" in name for name in opened)
        (path / "linked").unlink()


FIELDS = ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "model_type", "architectures", "auto_map", "text_config", "quantization_config", "tie_word_embeddings", "intermediate_size", "num_experts", "head_dim"]  # fmt: skip


def configs(changes: dict[str, Any], folder: Path) -> None:
    path = checkpoint(folder)
    config = json.loads((path / "good.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    layers = Checkpoint.open(path).config.get("num_hidden_layers")
    assert layers is None or isinstance(layers, list | dict) or 0 <= layers <= 256


def config_bytes(data: bytes, folder: Path) -> None:
    path = checkpoint(folder)
    (path / "config.json").write_bytes(data)
    Checkpoint.open(path)


def cards(data: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(data)
    found = source_metadata(folder)
    assert all(isinstance(value, str) for key, value in found.items() if key != "languages")
    assert all(isinstance(value, str) for value in found.get("languages", []))


def tokenizers(data: bytes, folder: Path) -> None:
    path = folder / "tokenizer"
    if not path.exists():
        path.mkdir()
        tiny_models.save_tokenizer(path)
    (path / "tokenizer.json").write_bytes(data)
    load_tokenizer(path)


# --- adapters, reports, rows ---

PATTERNS = ["(a+)+$", "(" * 50, "(x|x)*y", ".*.*.*.*.*.*.*.*$", "q_proj", "\\", "[", "a{99999}"]
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": "m"}  # fmt: skip
ADAPTER_KEYS = [
    *ADAPTER,
    "rank_pattern",
    "alpha_pattern",
    "init_r",
    "use_rslora",
    "use_dora",
    "megatron_config",
    "lora_bias",
]
adapter_value = values | st.dictionaries(st.sampled_from(PATTERNS), numbers, max_size=2) | st.sampled_from(PATTERNS)


def adapter_folder(folder: Path) -> Path:
    path = folder / "adapter"
    if not path.exists():
        path.mkdir()
        linear = f"base_model.model.model.layers.0.self_attn.{'q' * 40}.lora_"
        (path / "adapter_model.safetensors").write_bytes(
            save({f"{linear}A.weight": torch.ones(2, 8), f"{linear}B.weight": torch.ones(8, 2)})
        )
    return path


def adapters(changes: dict[str, Any], folder: Path) -> None:
    path = adapter_folder(folder)
    (path / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    use_adapter(path)


def adapter_bytes(data: bytes, folder: Path) -> None:
    path = adapter_folder(folder)
    (path / "adapter_config.json").write_bytes(data)
    use_adapter(path)


def use_adapter(path: Path) -> None:
    adapter = Adapter.open(str(path))
    for linear in adapter.parts:
        adapter.update(linear)
    base_name(path)


REPORT = {"version": 2, "created": "2026-01-01T00:00:00+00:00", "recipe": {"model": "m", "output": "o", "seed": 0, "stages": [{"quantize": {"scheme": "W4A16"}}, {"merge": {"adapters": [{"path": "a"}]}}]}, "seed": 0, "environment": {}, "stages": [{"name": "quantize", "key": "k", "status": "done", "seconds": 1.0}]}  # fmt: skip
REPORT_KEYS = [*REPORT, "output", "source", "linears", "evaluations", "finetune", "checks", "notes", "merge", "speed"]


def reports(example: tuple[dict[str, Any], Any], folder: Path) -> None:
    """A report says what was done, and is what later verbs read: recipe, provenance, card, push."""
    changes, stages = example
    path = folder / "made" / "llmcompress" / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = REPORT["recipe"] | ({} if stages is None else {"stages": stages})  # type: ignore[operator]
    path.write_text(json.dumps(REPORT | {"environment": ENVIRONMENT, "recipe": recipe} | changes))
    use_report(path.parent.parent)


def report_bytes(data: bytes, folder: Path) -> None:
    path = folder / "made" / "llmcompress" / "report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    use_report(path.parent.parent)


def use_report(folder: Path) -> None:
    report = RunReport.load(folder)
    problems: list[LLMCompressError] = []
    for use in (
        lambda: resumed_recipe(folder, [{"verify": {}}]),
        lambda: texts_of(report),
        lambda: write_card(folder),
        lambda: refuse_strangers(folder),
        lambda: plan(folder, "a/b", public=True),
    ):
        with collected(problems):
            use()
    raise_all(problems)


def rows(data: bytes, folder: Path) -> None:
    for suffix in (".jsonl", ".json"):
        (folder / f"rows{suffix}").write_bytes(data)
        found, _ = read_rows(str(folder / f"rows{suffix}"), None, "train", None)
        for row in found:
            try:
                chat.parse_messages(row.fields.get("messages"))
                chat.parse_tools(row.fields.get("tools"))
            except chat.UnusableRowError:
                pass


def calibrations(data: bytes, folder: Path) -> None:
    (folder / "set.yaml").write_bytes(data)
    CalibrationSpec.find(str(folder / "set.yaml"))


# --- YAML ---


def recipes(data: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(data)
    recipe.load(str(folder / "recipe.yaml"))


def overrides(text: str, folder: Path) -> None:
    recipe.load("quickstart", [text])


def suites(data: bytes, folder: Path) -> None:
    (folder / "suite.yaml").write_bytes(data)
    load_suite(str(folder / "suite.yaml"))


def tasks(data: bytes, folder: Path) -> None:
    (folder / "task.yaml").write_bytes(data)
    found = TaskFiles.read([folder])
    for task in found.tasks.values():
        code_problems(task, {"acc"}, {"mean"})
    for problem in found.problems:
        raise problem


RECIPE = "model: m\noutput: o\nseed: 1\nstages:\n  - quantize: {scheme: W4A16, symmetric: no}\n  - verify: {}\n"
SUITE = "name: s\ndescription: d\ntasks:\n  - {task: t, metric: acc, budget: 0.1}\ntexts: []\n"
TASK = "task: t\ndataset_path: json\ndoc_to_text: '{{x}}'\nmetric_list:\n  - {metric: acc, aggregation: mean}\n"
CARD = "---\nlicense:\n- mit\nlanguage:\n- no\nmodel-index:\n- name: x\n---\ntext\n"
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "architectures": ["X"]}).encode()
TOKENIZER = json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}}).encode()  # fmt: skip

ENVIRONMENT = json.loads(describe().model_dump_json())
ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "tools": "[]"}\n'
CALIBRATION = "name: n\ntext: t.jsonl\nfield: text\nnum_samples: 4\nseq_len: 8\nseed: 0\n"

CASES: dict[str, tuple[st.SearchStrategy[Any], Body]] = {
    "header": (header, headers),
    "damaged safetensors": (broken_bytes(SMALL_FILE), damaged),
    "index": (st.tuples(st.dictionaries(st.just("model.norm.weight") | names, shard, max_size=3) | values, st.booleans()), indexes),
    "config fields": (st.dictionaries(st.sampled_from(FIELDS), values, max_size=3), configs),
    "config bytes": (broken_bytes(CONFIG), config_bytes),
    "model card": (broken_text(CARD), cards),
    "tokenizer": (broken_bytes(TOKENIZER), tokenizers),
    "adapter": (st.dictionaries(st.sampled_from(ADAPTER_KEYS), adapter_value, max_size=3), adapters),
    "adapter bytes": (broken_bytes(json.dumps(ADAPTER).encode()), adapter_bytes),
    "report": (st.tuples(st.dictionaries(st.sampled_from(REPORT_KEYS), values, max_size=2), st.none() | values | st.lists(st.dictionaries(st.sampled_from(["quantize", "merge", "finetune", "distill", "x"]), values, max_size=2), max_size=2)), reports),
    "report bytes": (broken_bytes(json.dumps(REPORT | {"environment": ENVIRONMENT}).encode()), report_bytes),
    "rows": (broken_text(ROWS), rows),
    "calibration set": (broken_text(CALIBRATION), calibrations),
    "recipe": (broken_text(RECIPE), recipes),
    "override": (st.tuples(st.sampled_from(["seed", "quantize.scheme", "quantize.ignore.0", ""]), st.just("=") | st.text(max_size=1), broken_text("[1, a]")).map(lambda parts: f"{parts[0]}{parts[1]}{parts[2].decode(errors='replace')}"), overrides),
    "suite": (broken_text(SUITE), suites),
    "task": (broken_text(TASK), tasks),
}  # fmt: skip


def hold(case: str, examples: int, folder: Path) -> None:
    strategy, body = CASES[case]

    @settings(
        max_examples=examples, deadline=timedelta(seconds=10), derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def holds(example: Any) -> None:
        try:
            body(example, folder)
        except LLMCompressError as error:
            for line in error.lines():
                assert line and "\n" not in line and "\x1b" not in line
                line.encode()

    holds()


@pytest.mark.parametrize("case", CASES)
def test_a_broken_file_is_one_line(case: str, tmp_path: Path) -> None:
    hold(case, 60, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_broken_files(case: str, tmp_path: Path) -> None:
    hold(case, 10_000, tmp_path)


TEMPLATE_PARTS = ["{{ x }}", "{% for i in range(99999) %}", "{% endfor %}", "{{ x.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ ''.format_map }}", "{% set x = x ~ x %}", "{{ 'a' * 9**9 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'x' %}", "{{ lipsum(n=10**7) }}", "{% raw %}", "{{ '{0.__class__}'.format(x) }}", "{{ x|map(attribute='__class__')|list }}", "{{"]  # fmt: skip


class Chats:
    """A tokenizer with somebody's chat template, and an impatient renderer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tiny_models.save_tokenizer(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def render(self, template: str) -> str:
        self.tokenizer.chat_template = template
        try:
            return chat.render(self.tokenizer, [{"role": "user", "content": "x"}])
        except chat.UnusableRowError as error:
            raise LLMCompressError(shown(error, 400)) from error


def hold_templates(examples: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = Chats(folder)
    monkeypatch.setattr(templates, "SECONDS_IN_ALL", 1e9)
    with Renderer(seconds=0.5) as renderer, Renderer(0.5, "chat") as impatient:
        monkeypatch.setitem(templates._chats, os.getpid(), impatient)

        @settings(
            max_examples=examples, deadline=timedelta(seconds=10), derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.lists(st.sampled_from(TEMPLATE_PARTS) | st.text(max_size=5), max_size=5).map("".join))
        def holds(template: str) -> None:
            for render in (partial(renderer.render, values={"x": "value"}), chats.render):
                try:
                    text = render(template)
                except LLMCompressError as error:
                    assert "\n" not in error.message
                else:
                    assert len(text) <= 1 << 21 and "<class" not in text and "<module" not in text

        holds()


def test_a_template_renders_within_bounds_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_templates(25, tmp_path, monkeypatch)


@pytest.mark.slow
def test_ten_thousand_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_templates(10_000, tmp_path, monkeypatch)
