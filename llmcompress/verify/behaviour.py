"""Checks that compute: both models read some text, a decoder layer in memory at a time (`models.streamed`).

    original ── samples ──> tokens_RS ─┬─ original ──> logits ─┐
                                       └─ ours ──────> logits ─┴─> ||difference||^2 / ||original's||^2 <= bound

The text is drawn from the original's own predictions with a seed, so no data is needed and the tokens are such as it
meets. Token by token that would be a pass over the layers each; here a few passes draw all positions at once, each from
what the pass before wrote. With the same random numbers in every pass, k passes give k tokens of the very text that
drawing one by one gives, and the rest is drawn after text that is nearly so (Jacobi iteration; Song et al. 2021).

Logits are compared less their mean over the vocabulary, which softmax does not see. The same figure is then taken
between our reading of the files and the engine's own, which must agree closely, not merely roughly; of a large
checkpoint a few layers at a time (cut.py).

Shapes: R rows, S tokens of each, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.dequantized import DequantizedWeights, stream_dequantized
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.evaluate import engines
from llmcompress.memory import give_back
from llmcompress.models import meta
from llmcompress.models.config import max_positions, special_token
from llmcompress.models.loading import best_device
from llmcompress.models.streamed import StreamedModel, stream_checkpoint
from llmcompress.models.vocabulary import num_embeddings
from llmcompress.report import Check, RunReport
from llmcompress.verify.cut import cut

ROWS, TOKENS = 4, 32
PASSES = 4
"""In which the text is drawn."""
NEW_TOKENS = 16
STREAMED_NEW_TOKENS = 4
"""Where layers do not stay in memory: every token reads all of them anew."""
ENGINE_BOUND = 0.01
"""An engine that reads the same codes differs by its kernel's rounding: bfloat16 gives about 1e-5 of this figure."""
TIE = 1e-3
"""Logits closer than this may change places with the order of a sum."""
CUT_BYTES = 128 << 20
"""Layers in float32 that an engine is given at a time."""
CUTS = 4
"""Cuts of a checkpoint that an engine is given at most, from the first layer to the last."""


def checks(
    folder: Path, source: Checkpoint | None, missing: str, bound: float, seed: int, trust_remote_code: bool
) -> Iterator[Check]:
    """logits, generation and engine; `missing` says why there is no source.

    The original and ours come one after the other, each a layer at a time.
    """
    tokens_RS = original_RSV = None
    if source is not None:
        try:
            with third_party(f"{source.name}: transformers cannot run it"):
                original = stream_checkpoint(source)
                tokens_RS = sample_tokens(original, seed)
                original_RSV = centered_logits(original, tokens_RS)
                del original
                give_back()
        except LLMCompressError as error:
            missing = f"the source does not load: {error.message}"
    try:
        with third_party(f"{folder}: our reader fails"):
            ours = stream_dequantized(folder)
            if tokens_RS is None:
                tokens_RS = sample_tokens(ours, seed)
            ours_RSV = centered_logits(ours, tokens_RS)
    except LLMCompressError as error:
        for name in ("logits", "generation", "engine"):
            yield Check(name=name, passed=False, detail=error.message)
        return
    yield _logits(ours_RSV, original_RSV, tokens_RS, missing, bound)
    yield _generation(folder, ours, tokens_RS)
    del ours
    give_back()
    yield _engine(folder, trust_remote_code, tokens_RS, ours_RSV)


def generation(folder: Path, seed: int, trust_remote_code: bool) -> Check:
    """The generation check of a checkpoint with plain weights, a layer at a time."""
    model = stream_checkpoint(Checkpoint.open(str(folder), trust_remote_code=trust_remote_code))
    return _generation(folder, model, sample_tokens(model, seed))


def sample_tokens(model: StreamedModel, seed: int) -> torch.Tensor:
    """int64 [R, S]: a first token, and what `model` predicts after it, drawn with `seed` (module's docstring)."""
    config = model.config
    special = (special_token(config, name) for name in ("bos_token_id", "eos_token_id"))
    first = next((token for token in special if token is not None), 0)
    vocabulary = num_embeddings(model)
    length = min(TOKENS, max_positions(config) or TOKENS)
    tokens_RS = torch.randint(vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(seed))
    tokens_RS[:, 0] = first if 0 <= first < vocabulary else 0
    for _ in range(PASSES):
        (logits_RSV,) = model.logits([tokens_RS])
        table_TV = logits_RSV[:, :-1, :vocabulary].float().cpu().flatten(0, 1).softmax(-1).nan_to_num(1.0)
        drawn_T1 = torch.multinomial(table_TV, 1, generator=torch.Generator().manual_seed(seed))
        tokens_RS[:, 1:] = drawn_T1.reshape(ROWS, length - 1)
    return tokens_RS


def centered_logits(model: StreamedModel | Any, tokens_RS: torch.Tensor) -> torch.Tensor:
    """float64 [R, S, V] on the CPU, less the mean over V. model: streamed, or one of transformers."""
    if isinstance(model, StreamedModel):
        (logits_RSV,) = model.logits([tokens_RS])
    else:
        with torch.inference_mode():
            logits_RSV = model(input_ids=tokens_RS.to(model.device), use_cache=False).logits
    logits_RSV = logits_RSV.double().cpu()
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
    detail += f"{tokens_RS.numel()} tokens that the original predicts"
    if ours_RSV.shape == original_RSV.shape:
        top1 = float((ours_RSV.argmax(-1) == original_RSV.argmax(-1)).double().mean())
        detail += f"; the same top-1 token on {top1:.1%} of them"
    return Check(name="logits", passed=error <= bound, detail=detail)


def _generation(folder: Path, model: StreamedModel, tokens_RS: torch.Tensor) -> Check:
    """Greedy under the folder's generation config with the model's cache, against one pass over the same text without.

    Both must choose the same token at every step, but for choices so close that rounding decides.
    """
    from transformers import GenerationConfig

    prompt_1S = tokens_RS[:1, : max(1, tokens_RS.shape[1] - NEW_TOKENS)].to(model.device)
    new_tokens = NEW_TOKENS if model.in_memory else STREAMED_NEW_TOKENS
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    options |= {"attention_mask": torch.ones_like(prompt_1S), "output_logits": True, "return_dict_in_generate": True}
    try:
        with third_party("generate() fails"):
            if (folder / "generation_config.json").is_file():
                model.model.generation_config = GenerationConfig.from_pretrained(folder)  # type: ignore[assignment]
            with torch.inference_mode():
                written = model.model.generate(prompt_1S, **options)  # type: ignore[operator]
            (whole_1SV,) = model.logits([written.sequences[:1]])
    except LLMCompressError as error:
        return Check(name="generation", passed=False, detail=error.message)
    cached_NV = torch.cat([logits_1V[:1].to(whole_1SV) for logits_1V in written.logits])
    uncached_NV = whole_1SV[0, prompt_1S.shape[1] - 1 :][: len(cached_NV)]
    parted = _parted(cached_NV, uncached_NV)
    without = "the same" if parted is None else f"but other ones from token {parted} on"
    detail = f"{len(cached_NV)} tokens written greedily after {prompt_1S.shape[1]} with a cache, {without} without"
    return Check(name="generation", passed=len(cached_NV) > 0 and parted is None, detail=detail)


def _parted(cached_NV: torch.Tensor, uncached_NV: torch.Tensor) -> int | None:
    """The first step at which two tables of logits choose differently, and not because two tokens tie."""
    for step, (cached_V, uncached_V) in enumerate(zip(cached_NV, uncached_NV, strict=True)):
        first, second = int(cached_V.argmax()), int(uncached_V.argmax())
        if first != second and not abs(float(uncached_V[first] - uncached_V[second])) < TIE:
            return step
    return None


def _engine(folder: Path, trust_remote_code: bool, tokens_RS: torch.Tensor, ours_RSV: torch.Tensor) -> Check:
    """The layout's own engine, where it is installed, against our reading of the same files."""
    reason = engines.unavailable(folder)
    if reason is not None:
        return Check(name="engine", passed=True, ran=False, detail=f"not loaded by its own engine: {reason}")
    try:
        with third_party("the engine cannot be compared"):
            error, engine, what = _engine_errors(folder, trust_remote_code, tokens_RS, ours_RSV)
    except LLMCompressError as refusal:
        return Check(name="engine", passed=False, detail=refusal.message)
    detail = f"{engine} and our reading{what}: squared distance of their logits {error:.2g} (bound {ENGINE_BOUND:g})"
    return Check(name="engine", passed=error <= ENGINE_BOUND, detail=detail)


def _engine_errors(
    folder: Path, trust_remote_code: bool, tokens_RS: torch.Tensor, ours_RSV: torch.Tensor
) -> tuple[float, str, str]:
    """(largest relative error, the engine, of which layers): of all layers together, or of cuts where they are large.

    Raises: LLMCompressError for a checkpoint, or a cut of it, that the engine refuses.
    """
    checkpoint, report = Checkpoint.open(str(folder), trust_remote_code=trust_remote_code), RunReport.load(folder)
    model = meta.build(checkpoint, quantized=True)
    streamed = StreamedModel(
        model, DequantizedWeights(checkpoint, report, model, torch.float32), torch.device("cpu"), torch.float32
    )
    depth, at_once = streamed.depth, max(1, CUT_BYTES // streamed.layer_bytes)
    if at_once >= depth:
        loaded = engines.load(folder, "native", trust_remote_code)
        return relative_error(centered_logits(loaded.model, tokens_RS), ours_RSV), loaded.engine, ""
    del streamed
    starts = range(0, depth, at_once)
    if len(starts) > CUTS:
        starts_of_cuts = sorted({round(number * (depth - at_once) / (CUTS - 1)) for number in range(CUTS)})
    else:
        starts_of_cuts = list(starts)
    errors, engine, shown = [], "", []
    for start in starts_of_cuts:
        stop = min(start + at_once, depth)
        with tempfile.TemporaryDirectory() as scratch:
            part = Path(scratch) / "cut"
            cut(checkpoint, part, start, stop)
            ours = _read_cut(part, checkpoint, report, start)
            expected_RSV = centered_logits(ours, tokens_RS)
            del ours
            loaded = engines.ENGINES["native"].load(part, None, trust_remote_code)
            errors.append(relative_error(centered_logits(loaded.model, tokens_RS), expected_RSV))
            engine = loaded.engine
            del loaded
            give_back()
        shown.append(f"{start}-{stop - 1}" if stop - start > 1 else str(start))
    return max(errors), engine, f" of layers {', '.join(shown)} of {depth}, each cut out with embedding and head"


def _read_cut(part: Path, checkpoint: Checkpoint, report: RunReport, start: int) -> StreamedModel:
    """Our reading of a cut: the modules that its config makes, with the whole checkpoint's weights."""
    opened = Checkpoint.open(str(part), trust_remote_code=checkpoint.trust_remote_code)
    whole = meta.build(checkpoint, quantized=True)
    weights = DequantizedWeights(checkpoint, report, whole, torch.float32)
    return StreamedModel(meta.build(opened, quantized=True), weights, best_device(), torch.float32, first_layer=start)
