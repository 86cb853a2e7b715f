"""Held-out figures against the same figures computed one row at a time, by transformers and by NumPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import nn

from llmcompress.data.collate import Example, pack_examples
from llmcompress.errors import LLMCompressError
from llmcompress.training.heldout import heldout_kl, heldout_loss
from tests import tiny_models

V = 96


def model(seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(tiny_models.configs()["llama"]).float()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval()


def rows(trained_from: int = 1) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, V, (size,), generator=generator).tolist() for size in (5, 9, 3, 12, 7)]
    return [Example("", row, [place >= trained_from for place in range(len(row))]) for row in ids]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_is_that_of_transformers_row_by_row(batch_size: int) -> None:
    checked, heldout = model(0), rows(trained_from=2)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in heldout:
            ids = torch.tensor([row.ids])
            labels = ids.masked_fill(~torch.tensor([row.loss_mask]), -100)
            number = sum(row.loss_mask)
            total, count = total + float(checked(input_ids=ids, labels=labels).loss) * number, count + number
    loss, tokens = heldout_loss(checked, heldout, 0, batch_size)
    assert tokens == count and loss == pytest.approx(total / count, rel=1e-5)


def test_the_loss_leaves_the_mode_as_it_was_and_ignores_dropout() -> None:
    checked = model(0)
    checked.config.attention_dropout = 0.5
    expected = heldout_loss(checked, rows(), 0, 2)
    assert heldout_loss(checked.train(), rows(), 0, 2) == expected and checked.training
    nothing = [Example("", [5, 6], [False, False])]
    assert np.isnan(heldout_loss(checked, nothing, 0, 1)[0]) and heldout_loss(checked, nothing, 0, 1)[1] == 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_divergence_is_scipys_over_every_token_that_has_one_before(batch_size: int) -> None:
    reference, candidate = model(0), model(1)
    total, count = 0.0, 0
    for row in rows():
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            p, q = (
                np.exp(log_softmax(each(input_ids=ids).logits[0, :-1].double().numpy(), -1))
                for each in (reference, candidate)
            )
        total, count = total + rel_entr(p, q).sum(), count + len(row.ids) - 1
    kl, tokens = heldout_kl(reference, candidate, rows(), 0, batch_size)
    assert tokens == count and kl == pytest.approx(total / count, rel=1e-5)
    assert heldout_kl(reference, reference, rows(), 0, batch_size)[0] == 0


def test_packed_rows_give_the_same_loss() -> None:
    checked = model(0)
    alone, packed = heldout_loss(checked, rows(), 0, 1), heldout_loss(checked, pack_examples(rows(), 20), 0, 2)
    assert packed[1] == alone[1] and packed[0] == pytest.approx(alone[0], rel=1e-5)


class Fixed(nn.Module):
    """Gives the same logits for every token."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, value: float) -> None:
        super().__init__()
        self.logits = torch.full((vocabulary,), value)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(LLMCompressError, match="vocabularies of 96 and 97 cannot be compared"):
        heldout_kl(Fixed(96, 0.0), Fixed(97, 0.0), rows(), 0, 2)
    with pytest.raises(LLMCompressError, match="logits that are not finite"):
        heldout_kl(Fixed(96, 0.0), Fixed(96, float("nan")), rows(), 0, 2)
    with pytest.raises(LLMCompressError, match="no held-out token"):
        heldout_kl(Fixed(96, 0.0), Fixed(96, 0.0), [], 0, 2)
