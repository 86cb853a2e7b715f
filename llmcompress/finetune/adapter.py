"""A PEFT adapter folder as it lies on disk: its config, and the update that it holds for each linear.

    adapter_config.json        peft_type, r, lora_alpha, rank_pattern, alpha_pattern, use_dora, use_rslora …
    adapter_model.safetensors  base_model.model.PATH.lora_A.weight, .lora_B.weight, .lora_magnitude_vector
                               AdaLoRA: PATH.lora_A, .lora_B, .lora_E, cut to the rank of each linear
                               modules_to_save: base_model.model.PATH.weight, whole

PEFT wraps what it touches, and some of the wrappers' names end in the file: PATH.base_layer.weight is the weight below
a LoRA (kept for an output head, whose vocabulary may have been resized), PATH.modules_to_save.NAME.weight the trained
copy of a whole module, PATH.original_module.weight what that copy was made from.

Read with our own reader, a tensor at a time, so that an adapter takes no more memory than its largest linear. What a
config may ask for beyond this is refused by name: a merge that left something out would look like a success.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.files import read_json, refuse_outside
from llmcompress.checkpoint.safetensors import StoredTensor, read_header
from llmcompress.errors import LLMCompressError, raise_all, shown
from llmcompress.finetune.update import Update

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "ADALORA")
REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of a PEFT adapter that change what it computes in a way that is not merged here."""
MOST, MAX_PATTERN, MAX_REPEATS = 1 << 31, 2000, 4
DIGITS = re.compile(r"(\\d|\[(\\d|0-9)\])(\+|\*|\{1,\})")
"""The number of a layer in a pattern: it repeats over a digit or two."""
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)")
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_E|lora_magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, and how much of it is merged."""

    folder: Path
    config: dict[str, Any]
    stored: Mapping[str, StoredTensor]
    weight: float = 1.0

    @classmethod
    def open(cls, path: str, weight: float = 1.0) -> Adapter:
        """Read config and headers.

        Raises: LLMCompressError, all problems together: no adapter there, pickled weights, another kind of adapter, a
        setting that cannot be merged.
        """
        folder = Path(path).expanduser()
        if not (folder / CONFIG).is_file():
            what = "no such folder" if not folder.is_dir() else f"has no {CONFIG}"
            raise LLMCompressError(f"{path}: {what}", "an adapter is a folder that PEFT or `finetune` wrote")
        refuse_outside(folder, [path for path in folder.iterdir() if path.is_symlink()])
        config = read_json(folder / CONFIG)
        if not (folder / WEIGHTS).is_file():
            raise LLMCompressError(f"{folder}: has no {WEIGHTS}", "save the adapter as safetensors")
        adapter = cls(folder, config, read_header(folder / WEIGHTS), weight)
        raise_all(adapter._problems())
        return adapter

    @property
    def kind(self) -> str:
        """LORA or ADALORA."""
        return str(self.config.get("peft_type"))

    @property
    def dora(self) -> bool:
        """Whether rows are scaled to learned lengths."""
        return bool(self.config.get("use_dora"))

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """Linear -> part (lora_A …) -> tensor name."""
        parts: dict[str, dict[str, str]] = {}
        for name in self.stored:
            match = _PART.fullmatch(name.removeprefix(PREFIX))
            if match:
                parts.setdefault(match[1], {})[match[2]] = name
        return parts

    @cached_property
    def whole(self) -> dict[str, str]:
        """Parameter of the model -> tensor that replaces it (modules_to_save)."""
        updates = {name for parts in self.parts.values() for name in parts.values()} | set(self.bases.values())
        left = (name for name in self.stored if name not in updates and ".original_module." not in name)
        return {_unwrapped(name): name for name in left}

    @cached_property
    def bases(self) -> dict[str, str]:
        """Parameter of an adapted module -> tensor that it had below the adapter, where that was stored too."""
        return {_unwrapped(name): name for name in self.stored if ".base_layer." in name}

    def rank(self, linear: str) -> int:
        """Rank of what is stored for a linear."""
        return self.stored[self.parts[linear]["lora_A"]].shape[0]

    def update(self, linear: str) -> Update:
        """What this adapter adds to a linear, its weight included."""
        tensors = {part: self.stored[name].load() for part, name in self.parts[linear].items()}
        length = tensors.get("lora_magnitude_vector")
        return Update(
            tensors["lora_B"],
            tensors["lora_A"],
            self._scale(linear) * self.weight,
            tensors.get("lora_E"),
            None if length is None else length.reshape(-1),
        )

    def _scale(self, linear: str) -> float:
        alpha = float(_of_pattern(self.config.get("alpha_pattern"), linear, self.config.get("lora_alpha", 8)))
        if self.kind == "ADALORA":
            initial = float(self.config.get("init_r", 12))
            return (alpha if alpha > 0 else initial) / (initial + 1e-5)
        rank = float(_of_pattern(self.config.get("rank_pattern"), linear, self.config.get("r", 8)))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _problems(self) -> list[LLMCompressError]:
        where, config = f"{self.folder / CONFIG}", self.config
        problems = _value_problems(config, where)
        if self.kind not in KINDS:
            problems.append(LLMCompressError(f"{where}: peft_type is {self.kind}; {' and '.join(KINDS)} can be merged"))
        if config.get("megatron_config"):
            problems.append(
                LLMCompressError(
                    f"{where}: megatron_config is set, for which PEFT imports a module that the file names"
                )
            )
        for key in REFUSED:
            if config.get(key):
                problems.append(LLMCompressError(f"{where}: {key} is set, which cannot be merged into a weight"))
        if config.get("bias") not in (None, "none"):
            problems.append(LLMCompressError(f"{where}: bias is {config['bias']!r}; only 'none' can be merged"))
        for linear, parts in self.parts.items():
            lacking = {"lora_A", "lora_B"} - parts.keys()
            if lacking:
                problems.append(LLMCompressError(f"{self.folder}: {linear} has no {' and no '.join(sorted(lacking))}"))
        if any("lora_embedding" in name for name in self.stored):
            problems.append(LLMCompressError(f"{self.folder}: adapts an embedding, which cannot be merged here"))
        if not self.parts and not self.whole:
            problems.append(LLMCompressError(f"{self.folder}: {WEIGHTS} holds no update"))
        return problems


def _value_problems(config: dict[str, Any], where: str) -> list[LLMCompressError]:
    """Numbers that are none, and patterns that PEFT would search for ever; see `_quick`."""
    problems = []
    for key, least in (("r", 1), ("init_r", 1), ("lora_alpha", None)):
        value = config.get(key)
        if value and not _number(value, least):
            rule = "must be a number" if least is None else f"must be a number from {least} up"
            problems.append(LLMCompressError(f"{where}: {key} is {shown(repr(value))}; {rule}"))
    if config.get("peft_type") == "LORA" and not config.get("r"):
        problems.append(LLMCompressError(f"{where}: r is {config.get('r')}; an adapter of rank 0 holds nothing"))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        least = 1 if key == "rank_pattern" else None
        masks = config.get("peft_type") == "ADALORA" and key == "rank_pattern"  # of the ranks that are kept
        if not isinstance(patterns, dict) or not (masks or all(_number(value, least) for value in patterns.values())):
            problems.append(LLMCompressError(f"{where}: {key} must be an object of numbers"))
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []:
            if not isinstance(pattern, str) or not _quick(pattern):
                problems.append(LLMCompressError(f"{where}: {key} holds {shown(repr(pattern))}, no pattern of a path"))
    return problems


def _number(value: object, least: float | None) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
    return plain and (least is None or value >= least)  # type: ignore[operator]


def _quick(pattern: str) -> bool:
    """Whether a regular expression is one, and is found or not at once: short, no group repeated, few repetitions."""
    repeats = re.findall(r"[*+{]", DIGITS.sub("", pattern))
    if len(pattern) > MAX_PATTERN or len(repeats) > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _unwrapped(name: str) -> str:
    """A tensor's name in the file as the parameter's in the model.

    >>> _unwrapped("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    >>> _unwrapped("base_model.model.model.embed_tokens.modules_to_save.default.weight")
    'model.embed_tokens.weight'
    """
    path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    path = re.sub(r"\.modules_to_save(\.[^.]+)?$", "", path)
    return f"{re.sub(_WRAPPER, '', path)}.{leaf}"


def _of_pattern(pattern: object, linear: str, default: Any) -> Any:
    """The value of the first key that matches a linear's path from its end, as PEFT matches it."""
    for key, value in (pattern if isinstance(pattern, dict) else {}).items():
        if isinstance(value, int | float) and re.match(rf"(.*\.)?({key})$", linear):
            return value
    return default
