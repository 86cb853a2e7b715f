"""Load a checkpoint to be measured, and say what computes its numbers.

    config.json has no quantization_config  ->  transformers, the weights as they are (float32 on a CPU)
    an adapter's folder                     ->  its base with the adapter on it, by PEFT (adapted.py)
    compressed-tensors                      ->  transformers + compressed-tensors
    bitsandbytes                            ->  transformers + bitsandbytes
    gptq                                    ->  transformers + optimum + GPTQModel
    any of these, where its packages are missing or its kernel refuses this model  ->  our dequantized weights

What a user will run is the engine's own kernel, so that is measured wherever it is installed; a kernel is tried on a
few tokens first, since some only fail in their first forward. Either way the choice and its reason are in the report.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from llmcompress.console import quiet
from llmcompress.errors import LLMCompressError
from llmcompress.evaluate import adapted
from llmcompress.models.device import best
from llmcompress.report import Kernels

if TYPE_CHECKING:
    import torch

Choice = Literal["auto", "native", "dequantized"]

PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "GPTQModel")),
}
"""quant_method -> the packages (import name, distribution) that transformers needs for it."""
NATIVE_NOTES = {
    "compressed-tensors": "read by the engine's own code, which unpacks to dense weights where it has no kernel",
    "bitsandbytes": "the engine's own kernels on the packed weights",
    "gptq": "the engine's own kernels on the packed weights",
}
PROBE_TOKENS = 8
LOADING_ERRORS = (
    ImportError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OSError,
    SafetensorError,
)
"""What transformers and the engines raise for a checkpoint that they cannot load or run."""
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be measured. `engine` names what computes, `note` says whose kernels these are and why."""

    model: Any
    tokenizer: Any
    engine: str
    note: str
    device: str
    dtype: str
    kernels: Kernels = "native"


def quant_method(folder: Path) -> str | None:
    """How the weights of a checkpoint folder are stored: config.json's quant_method, or None for plain weights.

    Raises: LLMCompressError when there is no readable config.json.
    """
    stored = _config(folder).get("quantization_config")
    return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None


def _config(folder: Path) -> dict[str, Any]:
    path = (adapted.base_of(folder).folder if adapted.is_adapter(folder) else folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LLMCompressError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise LLMCompressError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise LLMCompressError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


def max_positions(folder: Path) -> int | None:
    """The longest sequence that a checkpoint was made for, in tokens, or None where its config does not say."""
    config = _config(folder)
    longest = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), None)
    return longest if isinstance(longest, int) else None


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer's files: what turns the same text into the same ids."""
    sha = hashlib.sha256()
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}):
        sha.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def load(folder: Path, choice: Choice = "auto", trust_remote_code: bool = False) -> Loaded:
    """The checkpoint in `folder` as a model in eval mode with its tokenizer; see the module's docstring.

    choice: `auto` prefers the engine's own kernels and says why where it could not have them, `native` insists on
    them, `dequantized` takes our own reading of the weights. A plain checkpoint has one way and ignores it.

    Raises: LLMCompressError when the checkpoint or its tokenizer does not load, or `native` cannot be had.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if adapted.is_adapter(folder):
        model, note = adapted.load(folder, trust_remote_code)
        return _loaded(model, tokenizer, f"peft {version('peft')} + transformers", note)
    method = quant_method(folder)
    if method is None:
        try:
            model = _from_pretrained(folder, trust_remote_code)
        except LOADING_ERRORS as error:
            raise LLMCompressError(f"{folder}: transformers cannot load it ({_first_line(error)})") from error
        return _loaded(model, tokenizer, "transformers", "plain weights, as stored")
    reason = "asked for" if choice == "dequantized" else _missing(method)
    if reason is None:
        found = _native(folder, method, trust_remote_code)
        if not isinstance(found, str):
            return _loaded(found, tokenizer, _engine_name(method), NATIVE_NOTES[method])
        reason = found
    if choice == "native":
        raise LLMCompressError(f"{folder}: cannot be run by {method}'s own kernels: {reason}", "use --engine auto")
    found = _loaded(_dequantized(folder), tokenizer, "transformers", f"our dequantized weights: {reason}")
    return replace(found, kernels="dequantized")


def unavailable(folder: Path) -> str | None:
    """Why the layout's own engine cannot be tried on the checkpoint in `folder` here, or None where it can."""
    method = quant_method(folder)
    return None if method is None else _missing(method)


def _missing(method: str) -> str | None:
    if method not in PACKAGES:
        return f"no engine for quant_method {method!r} is known here"
    lacking = [distribution for module, distribution in PACKAGES[method] if find_spec(module) is None]
    verb = "is" if len(lacking) == 1 else "are"
    return f"{' and '.join(lacking)} {verb} not installed" if lacking else None


def _native(folder: Path, method: str, trust_remote_code: bool) -> Any:
    """The model on the engine's own kernels, or one line on why that does not work."""
    import torch

    try:
        model = _from_pretrained(folder, trust_remote_code)
        token_ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.get_input_embeddings().num_embeddings
        with torch.inference_mode(), quiet("transformers"):
            logits = model(input_ids=token_ids, use_cache=False).logits
    except LOADING_ERRORS as error:
        return f"{method} refused it ({type(error).__name__}: {_first_line(error)})"
    return model if bool(torch.isfinite(logits).all()) else f"{method} gave logits that are not finite"


def _from_pretrained(folder: Path, trust_remote_code: bool) -> Any:
    """Raises one of LOADING_ERRORS, ValueError where transformers would go on with weights of its own making."""
    from transformers import AutoModelForCausalLM

    loading: Any = AutoModelForCausalLM
    with quiet("transformers"):
        model, info = loading.from_pretrained(
            folder,
            dtype=compute_dtype(folder),
            device_map={"": best()},
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    made_up = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if made_up:
        raise ValueError(f"{len(made_up)} weights are missing or of another shape, {made_up[0]} first")
    return model.eval()


def _dequantized(folder: Path) -> Any:
    from llmcompress.compress.dequantized import load_dequantized

    return load_dequantized(folder, compute_dtype(folder)).to(best()).eval()


def compute_dtype(folder: Path) -> torch.dtype:
    """The dtype that a checkpoint is run in: float32 on a CPU, where half precision is slow; else config.json's."""
    import torch

    config = _config(folder)
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return stored if best().type != "cpu" and isinstance(stored, torch.dtype) else torch.float32


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies in a checkpoint's folder.

    Raises: LLMCompressError when there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        with quiet("transformers"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LLMCompressError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})") from error


def _loaded(model: Any, tokenizer: Any, engine: str, note: str) -> Loaded:
    dtype = str(model.dtype).removeprefix("torch.")
    return Loaded(model, tokenizer, f"{engine} {version('transformers')}", note, str(model.device), dtype)


def _engine_name(method: str) -> str:
    names = [f"{distribution} {version(distribution)}" for _, distribution in PACKAGES[method]]
    return " + ".join([*names, "transformers"])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
