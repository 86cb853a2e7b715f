"""Engines: the programs that run a checkpoint, and the one way to have it run.

    engine        runs                                                        kernels
    Adapter       an adapter's folder: its base with the adapter on it        plain
    Dense         config.json without quantization_config: the weights as     plain
                  they are (float32 on a CPU)
    Layout        compressed-tensors, bitsandbytes, gptq by transformers      native
                  and the layout's own package
    OwnReader     what llmcompress wrote, as dense weights                    dequantized

What a user will run is the layout's own kernel, so that is measured wherever it is installed; a kernel is tried on a
few tokens first, since some only fail in their first forward. Where it cannot be had, `auto` falls back to our own
reading. Which it was, and why, is in `Loaded` and from there in the report. A new engine is a class here and its place
in `ENGINES`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmcompress.checkpoint.source import load_tokenizer
from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError, third_party
from llmcompress.evaluate import adapted
from llmcompress.evaluate.settings import Choice
from llmcompress.formats.base import by_quant_method
from llmcompress.models import config as configs
from llmcompress.models import loading
from llmcompress.models.tasks import CAUSAL
from llmcompress.models.vocabulary import guard_embedding, num_embeddings, tokenizer_place

if TYPE_CHECKING:
    import torch

Kernels = Literal["plain", "native", "dequantized"]
"""Whose arithmetic a figure rests on: transformers on plain weights, the layout's own package, or our reading."""

PROBE_TOKENS = 8


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
    def note(self) -> str:
        """The same in a sentence."""
        if self.kernels == "dequantized":
            return f"our dequantized weights: {self.reason}"
        if self.kernels == "plain":
            return self.reason or "plain weights, as stored"
        format = by_quant_method(str(self.layout))
        assert format is not None, "a layout whose kernels ran is a known one"
        return format.kernels

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

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool) -> Loaded:
        """The checkpoint, ready to be measured. Raises: LLMCompressError when it does not load."""
        ...


class Adapter:
    """PEFT and transformers, for a folder that holds an adapter alone."""

    def reads(self, folder: Path) -> bool:
        """See `Engine`."""
        return adapted.is_adapter(folder)

    def unavailable(self, folder: Path) -> str | None:
        """See `Engine`."""
        return None

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool) -> Loaded:
        """See `Engine`."""
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

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool) -> Loaded:
        """See `Engine`."""
        model = loading.load_model(folder, trust_remote_code=trust_remote_code)
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
        return f"{' and '.join(lacking)} {verb} not installed" if lacking else None

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool) -> Loaded:
        """See `Engine`; what is wrong is said without the folder's name, since a report repeats it."""
        import torch

        method = str(quant_method(folder))
        format = by_quant_method(method)
        assert format is not None, "asked for although it is unavailable"
        computed, stored = loading.compute_dtype(config_of(folder)), configs.stored_dtype(config_of(folder))
        dtypes = [computed] if stored in (None, computed) or not format.keeps_dtypes else [computed, stored]
        for dtype in dtypes:
            try:
                with third_party(f"{method} refused it"), quiet("transformers"):
                    model = loading.load_model(folder, trust_remote_code=trust_remote_code, name=method, dtype=dtype)
                    token_ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % num_embeddings(model)
                    with torch.inference_mode():
                        logits = model(input_ids=token_ids, use_cache=False).logits
                break
            except LLMCompressError:  # norms that do not convert, such as LayerNorm, run in the dtype of the file only
                if dtype is dtypes[-1]:
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

    def load(self, folder: Path, tokenizer: Any, trust_remote_code: bool) -> Loaded:
        """See `Engine`."""
        from llmcompress.compress.dequantized import load_dequantized

        model = load_dequantized(folder, loading.compute_dtype(config_of(folder))).to(loading.best_device()).eval()
        return Loaded(model, tokenizer, folder, _versions("transformers"), "dequantized", quant_method(folder))


ENGINES: dict[str, Engine] = {"adapter": Adapter(), "dense": Dense(), "native": Layout(), "dequantized": OwnReader()}


def load(folder: Path, choice: Choice = "auto", trust_remote_code: bool = False) -> Loaded:
    """The checkpoint in `folder` as a model in eval mode with its tokenizer; see the module's docstring.

    choice: `auto` prefers the layout's own kernels and says why where it could not have them, `native` insists on
    them, `dequantized` takes our own reading of the weights. A plain checkpoint has one way and ignores it.

    Raises: LLMCompressError when the checkpoint or its tokenizer does not load, or `native` cannot be had.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)
    for name in ("adapter", "dense"):
        if ENGINES[name].reads(folder):
            return ENGINES[name].load(folder, tokenizer, trust_remote_code)
    reason = "asked for" if choice == "dequantized" else unavailable(folder)
    if reason is None:
        try:
            return ENGINES["native"].load(folder, tokenizer, trust_remote_code)
        except LLMCompressError as error:
            reason = error.message
    if choice == "native":
        method = quant_method(folder)
        raise LLMCompressError(f"{folder}: cannot be run by {method}'s own kernels: {reason}", "use --engine auto")
    loaded = ENGINES["dequantized"].load(folder, tokenizer, trust_remote_code)
    return Loaded(loaded.model, tokenizer, folder, loaded.engine, loaded.kernels, loaded.layout, reason)


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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise LLMCompressError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise LLMCompressError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


def max_positions(folder: Path) -> int | None:
    """The longest sequence that a checkpoint was made for, in tokens, or None where its config does not say."""
    return configs.max_positions(config_of(folder))


def _versions(*distributions: str) -> str:
    """`bitsandbytes 0.50.2 + transformers 5.23.0`, as the report names an engine."""
    return " + ".join(f"{distribution} {version(distribution)}" for distribution in distributions)
