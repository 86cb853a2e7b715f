"""Engines: the programs that run a checkpoint, and the one way to have it run.

    engine        runs                                                        kernels
    Adapter       an adapter's folder: its base with the adapter on it        plain
    Dense         config.json without quantization_config: the weights as     plain
                  they are (float32 on a CPU)
    Layout        compressed-tensors, bitsandbytes, gptq by transformers      native
                  and the layout's own package
    OwnReader     what llmcompress wrote, as dense weights                    dequantized
    Stream        plain weights, or what llmcompress wrote, a decoder layer   plain or
                  in memory at a time                                         dequantized

What a user will run is the layout's own kernel, so that is measured wherever it is installed; a kernel is tried on a
few tokens first, since some only fail in their first forward. Where it cannot be had, `auto` falls back to our own
reading; where a model does not fit in memory, the caller may have it streamed. Which it was, and why, is in `Loaded`
and from there in the report. A new engine is a class here and its place in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmcompress.checkpoint.files import read_json
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.evaluate import adapted
from llmcompress.evaluate.settings import EvaluateChoice
from llmcompress.formats.base import by_quant_method
from llmcompress.memory import available_bytes
from llmcompress.models import config as configs
from llmcompress.models import loading
from llmcompress.models.streamed import StreamedModel, stream_checkpoint
from llmcompress.models.tasks import CAUSAL
from llmcompress.models.vocabulary import guard_embedding, num_embeddings, tokenizer_place
from llmcompress.report import RunReport, is_ours
from llmcompress.report.numerals import size

if TYPE_CHECKING:
    import torch

Kernels = Literal["plain", "native", "dequantized"]
"""Whose arithmetic a figure rests on: transformers on plain weights, the layout's own package, or our reading."""

PROBE_TOKENS = 8
ROOM_BYTES = 256 << 20
"""Beside a model, for its activations and logits."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be measured.

    engine: what computes, with versions. kernels: whose arithmetic it is. reason: why not the layout's own kernels,
    where they are dequantized; how the base is held, of an adapter.
    """

    model: Any
    tokenizer: Any
    folder: Path
    engine: str
    kernels: Kernels
    layout: str | None = None
    reason: str | None = None

    @property
    def device(self) -> str:
        """Where it is computed."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """The dtype of its activations."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def stored_dtype(self) -> str | None:
        """The dtype of its weights on disk, where they are plain and the config names one."""
        stored = configs.stored_dtype(config_of(self.folder)) if self.kernels == "plain" else None
        return None if stored is None else str(stored).removeprefix("torch.")

    @property
    def note(self) -> str:
        """The same in a sentence."""
        if self.streamed and self.kernels == "plain":
            return f"plain weights, {self.reason}"
        if self.kernels == "dequantized":
            return f"our dequantized weights: {self.reason}"
        if self.kernels == "plain":
            stored = self.stored_dtype
            same = stored in (None, self.dtype)
            return self.reason or ("plain weights, as stored" if same else f"plain weights, stored in {stored}")
        format = by_quant_method(str(self.layout))
        assert format is not None, "a layout whose kernels ran is a known one"
        return format.kernels

    @property
    def streamed(self) -> bool:
        """Whether its decoder layers are read where they are reached, so that it cannot write text in useful time."""
        return isinstance(self.model, StreamedModel)

    @property
    def num_logits(self) -> int:
        """V: entries of the next token's distribution."""
        return CAUSAL.num_predicted(self.model)

    def logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Next-token logits [B, S, V], without gradient, on the model's device."""
        import torch

        with torch.inference_mode():
            logits_BSV: torch.Tensor = self.model(input_ids=tokens_BS.to(self.model.device), use_cache=False).logits
        return logits_BSV

    def over(self, batches: Sequence[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Next-token logits [B, S, V] of each batch of tokens, in order, computed as they are asked for."""
        return self.model.logits(batches) if self.streamed else map(self.logits, batches)

    def guarded(self) -> Loaded:
        """Itself, refusing from now on whatever token its embedding has no row for, by name."""
        guard_embedding(self.model, self.tokenizer, tokenizer_place(self.folder))
        return self


class Engine(Protocol):
    """A program that runs checkpoints."""

    def reads(self, folder: Path) -> bool:
        """Whether checkpoints like the one in `folder` are its business."""
        ...

    def unavailable(self, folder: Path) -> str | None:
        """Why it cannot be tried on that checkpoint here, or None."""
        ...

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Loaded:
        """The checkpoint, ready to be measured, computed in `dtype` (None: that of `loading.compute_dtype`).

        Raises: LLMCompressError when it does not load.
        """
        ...


class Adapter:
    """PEFT and transformers, for a folder that holds an adapter alone."""

    def reads(self, folder: Path) -> bool:
        """See `Engine`."""
        return adapted.is_adapter(folder)

    def unavailable(self, folder: Path) -> str | None:
        """See `Engine`."""
        return None

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Loaded:
        """See `Engine`; the dtype is that of the training."""
        model, how = adapted.load(folder, trust_remote_code)
        return Loaded(model, tokenizer, folder, _versions("peft", "transformers"), "plain", reason=how)


class Dense:
    """transformers on plain weights."""

    def reads(self, folder: Path) -> bool:
        """See `Engine`."""
        return not adapted.is_adapter(folder) and quant_method(folder) is None

    def unavailable(self, folder: Path) -> str | None:
        """See `Engine`."""
        return None

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Loaded:
        """See `Engine`."""
        model = loading.load_model(folder, trust_remote_code=trust_remote_code, dtype=dtype)
        return Loaded(model, tokenizer, folder, _versions("transformers"), "plain")


class Layout:
    """transformers with the package that the layout of the weights belongs to."""

    def reads(self, folder: Path) -> bool:
        """See `Engine`."""
        return not adapted.is_adapter(folder) and quant_method(folder) is not None

    def unavailable(self, folder: Path) -> str | None:
        """See `Engine`."""
        method = quant_method(folder)
        format = by_quant_method(str(method))
        if format is None:
            return f"no engine for quant_method {method!r} is known here"
        lacking = [package.distribution for package in format.packages if find_spec(package.module) is None]
        verb = "is" if len(lacking) == 1 else "are"
        if lacking:
            return f"{' and '.join(lacking)} {verb} not installed"
        from llmcompress.models.experts import unread

        return unread(Checkpoint.open(folder))

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Loaded:
        """See `Engine`; what is wrong is said without the folder's name, since a report repeats it."""
        import torch

        method = str(quant_method(folder))
        format = by_quant_method(method)
        assert format is not None, "asked for although it is unavailable"
        computed, stored = dtype or loading.compute_dtype(config_of(folder)), configs.stored_dtype(config_of(folder))
        dtypes = [computed] if stored in (None, computed) or not format.keeps_dtypes else [computed, stored]
        for tried in dtypes:
            try:
                with third_party(f"{method} refused it"), quiet("transformers"):
                    model = loading.load_model(folder, trust_remote_code=trust_remote_code, name=method, dtype=tried)
                    token_ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % num_embeddings(model)
                    with torch.inference_mode():
                        logits = model(input_ids=token_ids, use_cache=False).logits
                break
            except LLMCompressError:  # norms that do not convert, such as LayerNorm, run in the dtype of the file only
                if tried is dtypes[-1]:
                    raise
        if not bool(torch.isfinite(logits).all()):
            raise LLMCompressError(f"{method} gave logits that are not finite")
        packages = [package.distribution for package in format.packages]
        return Loaded(model, tokenizer, folder, _versions(*packages, "transformers"), "native", layout=method)


class OwnReader:
    """Our own reading of what llmcompress wrote, as a dense model of transformers."""

    def reads(self, folder: Path) -> bool:
        """See `Engine`."""
        return Layout().reads(folder)

    def unavailable(self, folder: Path) -> str | None:
        """See `Engine`."""
        return None

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Loaded:
        """See `Engine`."""
        from llmcompress.compress.dequantized import load_dequantized

        model = (
            load_dequantized(folder, dtype or loading.compute_dtype(config_of(folder))).to(loading.best_device()).eval()
        )
        return Loaded(model, tokenizer, folder, _versions("transformers"), "dequantized", quant_method(folder))


class Stream:
    """Our own reading, a decoder layer in memory at a time."""

    def reads(self, folder: Path) -> bool:
        """See `Engine`."""
        return not adapted.is_adapter(folder) and (quant_method(folder) is None or is_ours(folder))

    def unavailable(self, folder: Path) -> str | None:
        """See `Engine`."""
        return None if self.reads(folder) else "only plain weights and what llmcompress wrote can be streamed"

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Loaded:
        """See `Engine`."""
        from llmcompress.compress.dequantized import stream_dequantized

        method = quant_method(folder)
        dtype = dtype or loading.compute_dtype(config_of(folder))
        if method is None:
            model = stream_checkpoint(Checkpoint.open(str(folder), trust_remote_code=trust_remote_code), dtype)
        else:
            model = stream_dequantized(folder, dtype)
        engine = f"{_versions('transformers')}, layer by layer"
        return Loaded(model, tokenizer, folder, engine, "plain" if method is None else "dequantized", method)


ENGINES: dict[str, Engine] = {
    "adapter": Adapter(), "dense": Dense(), "native": Layout(), "dequantized": OwnReader(), "stream": Stream(),
}  # fmt: skip


def load(
    folder: Path,
    choice: EvaluateChoice = "auto",
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    streams: bool = False,
) -> Loaded:
    """The checkpoint in `folder` as a model in eval mode with its tokenizer; see the module's docstring.

    choice: `auto` prefers the layout's own kernels and says why where it could not have them, `native` insists on
    them, `dequantized` takes our own reading of the weights, `stream` the same a layer at a time. A plain checkpoint
    knows the last of these alone. dtype: what it is computed in, where it is to be the same as another's; None: see
    `loading.compute_dtype`. streams: whether `auto` streams what does not fit in memory.

    Raises: LLMCompressError when the checkpoint or its tokenizer does not load, or `native` or `stream` cannot be had.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)
    why = "asked for" if choice == "stream" else too_large(folder) if streams and choice == "auto" else None
    if why is not None:
        refusal = ENGINES["stream"].unavailable(folder)
        if refusal is None:
            streamed = ENGINES["stream"].load(folder, tokenizer, trust_remote_code, dtype)
            return replace(streamed, reason=f"a decoder layer in memory at a time: {why}")
        if choice == "stream":
            raise LLMCompressError(f"{folder}: {refusal}", "use --engine auto")
    for name in ("adapter", "dense"):
        if ENGINES[name].reads(folder):
            return ENGINES[name].load(folder, tokenizer, trust_remote_code, dtype)
    reason = "asked for" if choice == "dequantized" else unavailable(folder)
    if reason is None:
        try:
            return ENGINES["native"].load(folder, tokenizer, trust_remote_code, dtype)
        except LLMCompressError as error:
            reason = error.message
    if choice == "native":
        method = quant_method(folder)
        raise LLMCompressError(f"{folder}: cannot be run by {method}'s own kernels: {reason}", "use --engine auto")
    loaded = ENGINES["dequantized"].load(folder, tokenizer, trust_remote_code, dtype)
    return Loaded(loaded.model, tokenizer, folder, loaded.engine, loaded.kernels, loaded.layout, reason)


def too_large(folder: Path) -> str | None:
    """Why a checkpoint does not fit in memory as a dense model, or None where it does or that cannot be told."""
    import torch

    if adapted.is_adapter(folder):
        return None
    stored = Checkpoint.open(str(folder), trust_remote_code=True).stored.values()  # headers alone are read
    rows = RunReport.load(folder).linears if quant_method(folder) is not None and is_ours(folder) else []
    packed = {row.tensor_prefix: prod(row.shape) for row in rows if row.outcome != "skipped"}
    others = sum(prod(tensor.shape) for tensor in stored if tensor.name.rpartition(".")[0] not in packed)
    needed = (others + sum(packed.values())) * loading.compute_dtype(config_of(folder)).itemsize
    device = loading.best_device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    if free is None or needed * 1.1 + ROOM_BYTES <= free:
        return None
    return f"the whole model takes {size(needed)}, and {size(free)} of memory are free"


def unavailable(folder: Path) -> str | None:
    """Why the layout's own engine cannot be tried on the checkpoint in `folder` here, or None where it can."""
    native = ENGINES["native"]
    return native.unavailable(folder) if native.reads(folder) else None


def quant_method(folder: Path) -> str | None:
    """How the weights of a checkpoint folder are stored: config.json's quant_method, or None for plain weights.

    Raises: LLMCompressError when there is no readable config.json.
    """
    stored = config_of(folder).get("quantization_config")
    return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder; of an adapter's folder, that of its base.

    Raises: LLMCompressError when it cannot be read.
    """
    path = (adapted.base_of(folder).folder if adapted.is_adapter(folder) else folder) / "config.json"
    return read_json(path)


def max_positions(folder: Path) -> int | None:
    """The longest sequence that a checkpoint was made for, in tokens, or None where its config does not say."""
    return configs.max_positions(config_of(folder))


def _versions(*distributions: str) -> str:
    """`bitsandbytes 0.50.2 + transformers 5.23.0`, as the report names an engine."""
    return " + ".join(f"{distribution} {version(distribution)}" for distribution in distributions)
