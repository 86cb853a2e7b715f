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
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate import engines as engine
from llmcompress.report import Check

ROWS, TOKENS = 4, 32
NEW_TOKENS = 16
ENGINE_BOUND = 0.01
"""An engine that reads the same codes differs by its kernel's rounding: bfloat16 gives about 1e-5 of this figure."""
TIE = 1e-3
"""Logits closer than this may change places with the order of a sum."""


def checks(
    folder: Path, source: Checkpoint | None, missing: str, bound: float, seed: int, trust: bool
) -> Iterator[Check]:
    """logits, generation and engine; `missing` says why there is no source."""
    try:
        ours = load_dequantized(folder)
    except LLMCompressError as error:
        for name in ("logits", "generation", "engine"):
            yield Check(name=name, passed=False, detail=error.message)
        return
    tokens_RS = sample_tokens(engine.load(source.folder, "auto", trust).model if source else ours, seed)
    ours_RSV = centred_logits(ours, tokens_RS)
    yield _logits(source, missing, bound, trust, tokens_RS, ours_RSV)
    yield _generation(folder, ours, tokens_RS)
    del ours
    yield _engine(folder, trust, tokens_RS, ours_RSV)


def writes(folder: Path, seed: int, trust: bool) -> Check:
    """The generation check of a checkpoint with plain weights, as transformers loads it."""
    model = engine.load(folder, "auto", trust).model
    return _generation(folder, model, sample_tokens(model, seed))


def sample_tokens(model: Any, seed: int) -> torch.Tensor:
    """int64 [R, S]: what `model` writes after its first token, drawn with `seed` from its own distribution."""
    config = model.config
    first = next((one for one in (config.bos_token_id, config.eos_token_id) if isinstance(one, int)), 0)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    longest = getattr(config, "max_position_embeddings", None) or TOKENS
    length = min(TOKENS, int(longest))
    rows_RS = torch.full((ROWS, 1), first if 0 <= first < vocabulary else 0, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        while rows_RS.shape[1] < length:
            logits_RV = model(input_ids=rows_RS, use_cache=False).logits[:, -1].float().cpu()
            drawn_R1 = torch.multinomial(logits_RV.softmax(-1).nan_to_num(1.0), 1, generator=generator)
            rows_RS = torch.cat((rows_RS, drawn_R1.to(rows_RS.device)), dim=1)
    found_RS: torch.Tensor = rows_RS.cpu()
    return found_RS


def centred_logits(model: Any, tokens_RS: torch.Tensor) -> torch.Tensor:
    """float64 [R, S, V] on the CPU, less the mean over V."""
    with torch.inference_mode():
        logits_RSV: torch.Tensor = model(input_ids=tokens_RS.to(model.device), use_cache=False).logits.double().cpu()
    return logits_RSV - logits_RSV.mean(-1, keepdim=True)


def distance(one_RSV: torch.Tensor, original_RSV: torch.Tensor) -> float:
    """||one - original||^2 / ||original||^2; NaN where either is not finite, infinite for other shapes."""
    if one_RSV.shape != original_RSV.shape:
        return float("inf")
    return float((one_RSV - original_RSV).square().sum() / original_RSV.square().sum())


def _logits(
    source: Checkpoint | None, missing: str, bound: float, trust: bool, tokens_RS: torch.Tensor, ours_RSV: torch.Tensor
) -> Check:
    if not bool(torch.isfinite(ours_RSV).all()):
        return Check(name="logits", passed=False, detail=f"not all finite, on {tokens_RS.numel()} tokens")
    if source is None:
        return Check(name="logits", passed=True, ran=False, detail=f"not compared: {missing}")
    original_RSV = centred_logits(engine.load(source.folder, "auto", trust).model, tokens_RS)
    found = distance(ours_RSV, original_RSV)
    same = float((ours_RSV.argmax(-1) == original_RSV.argmax(-1)).double().mean())
    detail = (
        f"squared distance from the original's logits, over their own size: {found:.3g} (bound {bound:g}), on "
        f"{tokens_RS.numel()} tokens that the original wrote; the same token first on {same:.1%} of them"
    )
    return Check(name="logits", passed=found <= bound, detail=detail)


def _generation(folder: Path, model: Any, tokens_RS: torch.Tensor) -> Check:
    """Greedy under the folder's generation config, twice: with the model's cache and without must write the same."""
    from transformers import GenerationConfig

    prompt_1S = tokens_RS[:1, : max(1, tokens_RS.shape[1] - NEW_TOKENS)]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt_1S)
    try:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        with torch.inference_mode():
            written, again = (model.generate(prompt_1S, use_cache=use, **options)[0] for use in (True, False))
    except engine.LOADING_ERRORS as error:
        detail = f"generate() ends in {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return Check(name="generation", passed=False, detail=detail)
    count, parted = len(written) - prompt_1S.shape[1], _parted(written, again)
    same = parted is None or _tied(model, again[:parted], int(written[parted]), int(again[parted]))
    said = "the same" if same else f"but other ones from token {parted} on"
    detail = f"{count} tokens written greedily after {prompt_1S.shape[1]} with a cache, {said} without"
    return Check(name="generation", passed=count > 0 and same, detail=detail)


def _parted(one_S: torch.Tensor, other_S: torch.Tensor) -> int | None:
    """The first place where two texts differ; the end of the shorter counts as none."""
    length = min(len(one_S), len(other_S))
    different = (one_S[:length] != other_S[:length]).nonzero()
    return int(different[0, 0]) if len(different) else None


def _tied(model: Any, before_S: torch.Tensor, one: int, other: int) -> bool:
    """Whether two tokens are so close after `before_S` that rounding decides between them."""
    with torch.inference_mode():
        logits_V = model(input_ids=before_S[None], use_cache=False).logits[0, -1]
    return abs(float(logits_V[one] - logits_V[other])) < TIE


def _engine(folder: Path, trust: bool, tokens_RS: torch.Tensor, ours_RSV: torch.Tensor) -> Check:
    """The layout's own engine, where it is installed, against our reading of the same files."""
    reason = engine.unavailable(folder)
    if reason is not None:
        return Check(name="engine", passed=True, ran=False, detail=f"not loaded by its own engine: {reason}")
    try:
        loaded = engine.load(folder, "native", trust)
    except LLMCompressError as error:
        return Check(name="engine", passed=False, detail=error.message)
    found = distance(centred_logits(loaded.model, tokens_RS), ours_RSV)
    detail = f"{loaded.engine} and our reading: squared distance of their logits {found:.2g} (bound {ENGINE_BOUND:g})"
    return Check(name="engine", passed=found <= ENGINE_BOUND, detail=detail)
