"""The teacher's cache: the stated bounds hold, nothing is read for another teacher or other data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.distill import cache, losses
from llmcompress.errors import LLMCompressError

N, S, V = 3, 5, 40


def distribution(seed: int, scale: float = 2.0) -> torch.Tensor:
    return (
        torch.randn(N * S, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    ).log_softmax(-1)


def asked(num_kept: int = 8, **changes: object) -> cache.CacheRequest:
    teachers = (cache.CachedTeacher(name="big", identity="abc", share=1.0),)
    values = {"teachers": teachers, "data": "d", "num_rows": N, "row_tokens": S, "num_kept": num_kept, "vocabulary": V}
    return cache.CacheRequest(**(values | {"temperature": 1.0, "combine": "probabilities"} | changes))  # type: ignore[arg-type]


def fill(root: Path, what: cache.CacheRequest, teacher_TV: torch.Tensor) -> cache.TeacherCache:
    ids, kept = (x.view(N, S, -1) for x in losses.fold(teacher_TV, what.num_kept))
    return cache.write(root, what, torch.ones(N, S, dtype=torch.bool), lambda a, b: (ids[a:b], kept[a:b]), 2)


@pytest.mark.parametrize("num_kept", [1, 4, 16, V - 1])
def test_folded_divergences_are_below_the_whole_and_within_the_bound(num_kept: int) -> None:
    teacher, student = distribution(0), distribution(1)
    ids, kept = losses.fold(teacher, num_kept)
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(N * S, dtype=torch.float64))
    mine = losses.folded(student, ids)
    gap = losses.forward_kl(student, teacher) - losses.forward_kl(mine, kept)
    tail = torch.ones(N * S, V, dtype=torch.bool).scatter(-1, ids, False)
    p, q = (x.masked_fill(~tail, -torch.inf).log_softmax(-1) for x in (teacher, student))
    inside = (p.exp() * (p - q)).masked_fill(~tail, 0).sum(-1)
    torch.testing.assert_close(gap, kept[..., -1].exp() * inside, rtol=1e-9, atol=1e-12)  # the chain rule
    assert bool((gap >= -1e-12).all())
    assert bool((gap <= losses.tail_bound(student, ids, kept) + 1e-12).all())
    for loss in (losses.reverse_kl, losses.jensen_shannon):
        assert bool((loss(student, teacher) >= loss(mine, kept) - 1e-12).all())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_moves_by_at_most_twice_the_rest(temperature: float) -> None:
    teacher, logits = distribution(0), distribution(1).requires_grad_()
    tempered_teacher = losses.log_probs(teacher, temperature)
    ids, kept = losses.fold(tempered_teacher, 6)
    student = losses.log_probs(logits, temperature)
    (whole,) = torch.autograd.grad(losses.forward_kl(student, tempered_teacher).sum(), logits, retain_graph=True)
    (cached,) = torch.autograd.grad(losses.forward_kl(losses.folded(student, ids), kept).sum(), logits)
    moved = (whole - cached).abs().sum(-1)
    assert float(moved.max()) > 0
    assert bool((moved <= 2 * kept[..., -1].exp() / temperature + 1e-12).all())


def test_all_tokens_kept_is_the_online_loss() -> None:
    teacher, student = distribution(0), distribution(1).requires_grad_()
    ids, kept = losses.fold(teacher, V)
    value = losses.forward_kl(losses.folded(student, ids), kept)
    torch.testing.assert_close(value, losses.forward_kl(student, teacher))
    value.sum().backward()
    assert torch.isfinite(student.grad).all()  # type: ignore[arg-type]
    assert not losses.tail_bound(student.detach(), ids, kept).any()


def test_written_and_read_again(tmp_path: Path) -> None:
    teacher = distribution(0)
    made = fill(tmp_path, asked(), teacher)
    found = cache.find(tmp_path, asked())
    assert found is not None and found.manifest == made.manifest
    ids, kept = found.rows(torch.tensor([2, 0]), 4)
    expected_ids, expected = (x.view(N, S, -1)[[2, 0], :4] for x in losses.fold(teacher, 8))
    assert torch.equal(ids, expected_ids) and torch.equal(kept, expected.float())
    rest = losses.fold(teacher, 8)[1][:, -1].exp()
    assert made.manifest.mean_rest == pytest.approx(float(rest.mean()))
    assert made.manifest.largest_rest == pytest.approx(float(rest.max()))


def test_another_teacher_other_data_or_settings_find_nothing(tmp_path: Path) -> None:
    fill(tmp_path, asked(), distribution(0))
    other = (cache.CachedTeacher(name="big", identity="other", share=1.0),)
    for changes in ({"teachers": other}, {"data": "e"}, {"temperature": 2.0}, {"num_kept": 9}, {"combine": "logits"}):
        assert cache.find(tmp_path, asked(**changes)) is None
    renamed = (cache.CachedTeacher(name="moved", identity="abc", share=1.0),)
    assert cache.find(tmp_path, asked(teachers=renamed)) is not None
    cache.check(tmp_path, asked(teachers=renamed))
    cache.check(tmp_path, asked(part="held-out", data="e"))
    assert cache.clear(tmp_path, asked(teachers=renamed)) == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"teachers": (cache.CachedTeacher(name="small", identity="def", share=1.0),)},
     r"predictions of big \(identity abc\), and the teacher is small \(identity def\)"),
    ({"teachers": tuple(cache.CachedTeacher(name=n, identity=n, share=0.5) for n in "xy")},
     r"the teacher is x \(identity x, share 0.5\) and y"),
    ({"data": "e"}, r"other rows \(digest d, now e"),
    ({"temperature": 2.0}, "temperature 1.0, now 2.0"),
    ({"num_kept": 9}, "likeliest tokens kept 8, now 9"),
    ({"combine": "logits"}, "averaged over teachers probabilities, now logits"),
])  # fmt: skip
def test_what_was_filled_for_something_else_is_refused_or_filled_again(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    old = fill(tmp_path, asked(), distribution(0)).folder
    wanted = asked(**changes)
    with pytest.raises(LLMCompressError, match=message) as caught:
        cache.check(tmp_path, wanted)
    assert "--refill-cache" in (caught.value.hint or "")
    assert cache.clear(tmp_path, wanted) == [old.name] and not old.exists()
    cache.check(tmp_path, wanted)


def test_damage_is_said(tmp_path: Path) -> None:
    folder = fill(tmp_path, asked(), distribution(0)).folder
    (folder / cache.IDS).write_bytes(b"nonsense")
    with pytest.raises(LLMCompressError, match="damaged teacher cache"):
        cache.find(tmp_path, asked())
    assert cache.clear(tmp_path, asked()) == [folder.name]


def test_an_interrupted_write_leaves_no_entry(tmp_path: Path) -> None:
    def stop(start: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(tmp_path, asked(), torch.ones(N, S, dtype=torch.bool), stop, 2)
    assert cache.find(tmp_path, asked()) is None and not cache.entries(tmp_path)
