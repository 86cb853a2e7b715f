"""Schemes: what exists is described, what does not is refused with the rule."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.compress.scheme import CODEBOOKS, PRESETS, ActivationGrid, Scheme, WeightGrid, preset, unserved
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.compress.targets import Linear, choose
from llmcompress.errors import LLMCompressError
from llmcompress.formats.base import FORMATS


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_bits": 5}, "num_bits 5: must be one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size 0: must be positive"),
        ({"codebook": "nf5"}, "unknown codebook 'nf5'; known: "),
        ({"codebook": "nf4"}, "NF4 has 4 bits, blocks of 64 and no zero point"),
        ({"double_quant": True}, "double_quant"),
    ],
)
def test_a_grid_that_does_not_exist_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LLMCompressError, match=words):
        WeightGrid(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "an empty scheme"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"sparsity": "4:2"}, "N:M"),
        ({"sparsity": "half"}, "N:M"),
        ({"rank": 0}, "rank 0: must be positive"),
    ],
)
def test_a_scheme_that_does_not_exist_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LLMCompressError, match=words):
        Scheme(**fields)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_a_codebook_is_a_table_of_ascending_values_as_wide_as_its_codes(name: str) -> None:
    book = CODEBOOKS[name]
    assert list(book.values) == sorted(book.values) and len(book.values) == 2**book.num_bits
    assert WeightGrid(book.num_bits, book.group_size, codebook=name).values == book.values


def test_labels_tell_schemes_apart() -> None:
    schemes = [
        *PRESETS.values(),
        Scheme(WeightGrid(8, -1), ActivationGrid()),
        Scheme(WeightGrid(8, -1), ActivationGrid(per="tensor")),
        Scheme(WeightGrid(), sparsity="2:4"),
        Scheme(sparsity=0.5),
        Scheme(rank=64),
    ]
    assert len({scheme.label() for scheme in schemes}) == len(schemes)
    assert preset("W4A16", symmetric=False).grid == WeightGrid(4, 128, False)


@pytest.mark.parametrize("part", ["activations", "sparsity", "rank"])
def test_what_the_method_does_not_serve_is_refused_before_any_work(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra: Any = {"activations": ActivationGrid(), "sparsity": "2:4", "rank": 8}[part]
    monkeypatch.setitem(PRESETS, "W4A16", Scheme(WeightGrid(4, 128), **{part: extra}))
    linears = [Linear("m.0.up", "m.0.up.weight", 0, "up", 64, 128, "Linear", "BF16")]
    with pytest.raises(LLMCompressError, match=f"method rtn serves weights, not {part} .*; choose a scheme without it"):
        choose(linears, QuantizeSettings(method="rtn"), list(FORMATS), "model")
    assert unserved(Scheme(WeightGrid()), frozenset({"weights"}), "anything") is None


def test_conv1d_is_refused_by_loaders_that_replace_linears_only() -> None:
    linears = [Linear("h.0.fc", "h.0.fc.weight", 0, "fc", 64, 128, "Conv1D", "F32")]
    settings = QuantizeSettings(method="rtn")
    with pytest.raises(LLMCompressError, match=r"replaces Linear, not Conv1D .*write gptq \(h"):
        choose(linears, settings, [FORMATS.get("compressed_tensors")], "model")
    assert choose(linears, settings, [FORMATS.get("gptq")], "model").targets[0].transposed


def test_all_problems_come_at_once() -> None:
    linears = [Linear(f"m.{i}.up", f"m.{i}.up.weight", i, "up", 64, 96, "Linear", "BF16") for i in range(3)]
    settings = QuantizeSettings(ignore=["*.none"], overrides=[{"pattern": "*.q"}])
    with pytest.raises(LLMCompressError) as caught:
        choose(linears, settings, [], "model")
    assert "ignore pattern '*.none'" in str(caught.value) and "override pattern '*.q'" in str(caught.value)
