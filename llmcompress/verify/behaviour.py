"""Checks that compute: the original writes some text, and both models read it.

    original ── samples ──> tokens_RS ─┬─ original ──> logits ─┐
                                       └─ ours ──────> logits ─┴─> ||difference||^2 / ||original's||^2 <= bound

The text is the original's own (drawn from it with a seed), so no data is needed and the tokens are such as it meets.
Logits are compared less their mean over the vocabulary, which softmax does not see. The same figure is then taken
between our reading of the files and the engine's own, which must agree closely, not merely roughly.

Shapes: R rows, S tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.dequantized import load_dequantized
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.evaluate import engines
from llmcompress.models.config import max_positions, special_token
from llmcompress.models.vocabulary import num_embeddings
from llmcompress.report import Check

ROWS, TOKENS = 4, 32
NEW_TOKENS = 16
ENGINE_BOUND = 0.01
"""An engine that reads the same codes differs by its kernel's rounding: bfloat16 gives about 1e-5 of this figure."""
TIE = 1e-3
"""Logits closer than this may change places with the order of a sum."""


def checks(
    folder: Path, source: Checkpoint | None, missing: str, bound: float, seed: int, trust_remote_code: bool
) -> Iterator[Check]:
    """logits, generation and engine; `missing` says why there is no source.

    The original and ours are in memory one after the other.
    """
    tokens_RS = original_RSV = None
    if source is not None:
        try:
            original = engines.load(source.folder, "auto", trust_remote_code).model
            tokens_RS = sample_tokens(original, seed)
            original_RSV = centered_logits(original, tokens_RS)
            del original
        except LLMCompressError as error:
            missing = f"the source does not load: {error.message}"
    try:
        with third_party(f"{folder}: our reader fails"):
            ours = load_dequantized(folder)
    except LLMCompressError as error:
        for name in ("logits", "generation", "engine"):
            yield Check(name=name, passed=False, detail=error.message)
        return
    if tokens_RS is None:
        tokens_RS = sample_tokens(ours, seed)
    ours_RSV = centered_logits(ours, tokens_RS)
    yield _logits(ours_RSV, original_RSV, tokens_RS, missing, bound)
    yield _generation(folder, ours, tokens_RS)
    del ours
    yield _engine(folder, trust_remote_code, tokens_RS, ours_RSV)


def generation(folder: Path, seed: int, trust_remote_code: bool) -> Check:
    """The generation check of a checkpoint with plain weights, as transformers loads it."""
    model = engines.load(folder, "auto", trust_remote_code).model
    return _generation(folder, model, sample_tokens(model, seed))


def sample_tokens(model: Any, seed: int) -> torch.Tensor:
    """int64 [R, S]: what `model` writes after its first token, drawn with `seed` from its own distribution."""
    config = model.config
    special = (special_token(config, name) for name in ("bos_token_id", "eos_token_id"))
    first = next((token for token in special if token is not None), 0)
    vocabulary = num_embeddings(model)
    length = min(TOKENS, max_positions(config) or TOKENS)
    rows_RS = torch.full((ROWS, 1), first if 0 <= first < vocabulary else 0, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        while rows_RS.shape[1] < length:
            logits_RV = model(input_ids=rows_RS, use_cache=False).logits[:, -1, :vocabulary].float().cpu()
            drawn_R1 = torch.multinomial(logits_RV.softmax(-1).nan_to_num(1.0), 1, generator=generator)
            rows_RS = torch.cat((rows_RS, drawn_R1.to(rows_RS.device)), dim=1)
    tokens_RS: torch.Tensor = rows_RS.cpu()
    return tokens_RS


def centered_logits(model: Any, tokens_RS: torch.Tensor) -> torch.Tensor:
    """float64 [R, S, V] on the CPU, less the mean over V."""
    with torch.inference_mode():
        logits_RSV: torch.Tensor = model(input_ids=tokens_RS.to(model.device), use_cache=False).logits.double().cpu()
    return logits_RSV - logits_RSV.mean(-1, keepdim=True)


def relative_error(logits_RSV: torch.Tensor, original_RSV: torch.Tensor) -> float:
    """||logits - original||^2 / ||original||^2; NaN where either is not finite, infinite for other shapes."""
    if logits_RSV.shape != original_RSV.shape:
        return float("inf")
    return float((logits_RSV - original_RSV).square().sum() / original_RSV.square().sum())


def _logits(
    ours_RSV: torch.Tensor, original_RSV: torch.Tensor | None, tokens_RS: torch.Tensor, missing: str, bound: float
) -> Check:
    if not bool(torch.isfinite(ours_RSV).all()):
        return Check(name="logits", passed=False, detail=f"not all finite, on {tokens_RS.numel()} tokens")
    if original_RSV is None:
        return Check(name="logits", passed=True, ran=False, detail=f"not compared: {missing}")
    error = relative_error(ours_RSV, original_RSV)
    detail = f"squared distance from the original's logits, over their own size: {error:.3g} (bound {bound:g}), on "
    detail += f"{tokens_RS.numel()} tokens that the original wrote"
    if ours_RSV.shape == original_RSV.shape:
        top1 = float((ours_RSV.argmax(-1) == original_RSV.argmax(-1)).double().mean())
        detail += f"; the same top-1 token on {top1:.1%} of them"
    return Check(name="logits", passed=error <= bound, detail=detail)


def _generation(folder: Path, model: Any, tokens_RS: torch.Tensor) -> Check:
    """Greedy under the folder's generation config, twice: with the model's cache and without must write the same."""
    from transformers import GenerationConfig

    prompt_1S = tokens_RS[:1, : max(1, tokens_RS.shape[1] - NEW_TOKENS)]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt_1S)
    try:
        with third_party("generate() fails"):
            if (folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(folder)
            with torch.inference_mode():
                cached, uncached = (model.generate(prompt_1S, use_cache=use, **options)[0] for use in (True, False))
    except LLMCompressError as error:
        return Check(name="generation", passed=False, detail=error.message)
    count, parted = len(cached) - prompt_1S.shape[1], _parted(cached, uncached)
    same = parted is None or _tied(model, uncached[:parted], int(cached[parted]), int(uncached[parted]))
    without = "the same" if same else f"but other ones from token {parted} on"
    detail = f"{count} tokens written greedily after {prompt_1S.shape[1]} with a cache, {without} without"
    return Check(name="generation", passed=count > 0 and same, detail=detail)


def _parted(first_S: torch.Tensor, second_S: torch.Tensor) -> int | None:
    """The first place where two texts differ; the end of the shorter counts as none."""
    length = min(len(first_S), len(second_S))
    different = (first_S[:length] != second_S[:length]).nonzero()
    return int(different[0, 0]) if len(different) else None


def _tied(model: Any, before_S: torch.Tensor, first: int, second: int) -> bool:
    """Whether two tokens are so close after `before_S` that rounding decides between them."""
    with torch.inference_mode():
        logits_V = model(input_ids=before_S[None], use_cache=False).logits[0, -1]
    return abs(float(logits_V[first] - logits_V[second])) < TIE


def _engine(folder: Path, trust_remote_code: bool, tokens_RS: torch.Tensor, ours_RSV: torch.Tensor) -> Check:
    """The layout's own engine, where it is installed, against our reading of the same files."""
    reason = engines.unavailable(folder)
    if reason is not None:
        return Check(name="engine", passed=True, ran=False, detail=f"not loaded by its own engine: {reason}")
    try:
        loaded = engines.load(folder, "native", trust_remote_code)
    except LLMCompressError as refusal:
        return Check(name="engine", passed=False, detail=refusal.message)
    error = relative_error(centered_logits(loaded.model, tokens_RS), ours_RSV)
    detail = f"{loaded.engine} and our reading: squared distance of their logits {error:.2g} (bound {ENGINE_BOUND:g})"
    return Check(name="engine", passed=error <= ENGINE_BOUND, detail=detail)
