"""config.json checked before anything is built from it: the types of the fields that are read, and their sizes.

transformers builds what a config says: `num_hidden_layers: 1000000000` is a loop over a thousand million modules, long
before it is noticed that the files hold two layers. The tensors are known first, so the config is held against them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from llmcompress.checkpoint.safetensors import StoredTensor
from llmcompress.errors import LLMCompressError, shown

TYPES: dict[str, tuple[type, ...]] = {
    "model_type": (str,),
    "architectures": (list,),
    "auto_map": (dict,),
    "tie_word_embeddings": (bool,),
    "quantization_config": (dict,),
    "text_config": (dict,),
}
"""What a field must be where it is given; null passes."""

POSITIVE = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "n_embd", "n_head", "d_model")
"""What transformers divides by."""

KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""What transformers takes as the name of a repository with compiled code, where a slash is in it."""

LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks)|(encoder|decoder)_layers")
EXPERTS = re.compile(r"(num|n)_(\w+_)?experts")
WIDTHS = re.compile(
    r"(\w+_)?(hidden|intermediate|vocab|embedding)_size|(\w+_)?head_dim|n_embd|n_inner|d_model|d_ff|ffn_dim"
)
LEAST = {"layers": 256, "experts": 1 << 16, "width": 1 << 22}
"""Up to these nothing is compared: layers may share tensors, experts lie in one, and a size may be a mere default."""
MOST_NESTED = 4


def config_problems(config: Mapping[str, Any], where: str) -> list[LLMCompressError]:
    """What is wrong with the fields of a config that are read here, nested configs included."""
    problems = []
    for key, field, value in _fields(config):
        kinds = TYPES.get(field)
        if value is None:
            continue
        if kinds and not isinstance(value, kinds):
            problems.append(_problem(where, key, value, f"must be {JSON_NAMES[kinds[0]]}"))
        elif field == "architectures" and not all(isinstance(name, str) for name in value):
            problems.append(_problem(where, key, value, "must be a list of class names"))
        elif field in POSITIVE and not isinstance(value, list) and (type(value) is not int or value < 1):
            problems.append(_problem(where, key, value, "must be an integer from 1 up"))
        elif field in KERNELS and "/" in str(value):
            problems.append(_problem(where, key, value, "code that would be fetched from a repository"))
        elif _count(field) and not isinstance(value, list | dict) and (type(value) is not int or value < 0):
            problems.append(_problem(where, key, value, "must be an integer from 0 up"))
    return problems


def size_problems(config: Mapping[str, Any], stored: Mapping[str, StoredTensor], where: str) -> list[LLMCompressError]:
    """Counts and widths of a config that the tensors in the files cannot fill."""
    num_values = sum(prod(tensor.shape) for tensor in stored.values())
    problems = []
    for key, field, value in _fields(config):
        kind = _count(field) or ("width" if WIDTHS.fullmatch(field) else None)
        held = num_values if kind == "width" else len(stored)
        if kind and type(value) is int and value > max(held, LEAST[kind]):
            unit = "values" if kind == "width" else "tensors"
            problems.append(_problem(where, key, value, f"the files hold {held} {unit}"))
    return problems


def _count(field: str) -> str | None:
    """What a field counts, where it does: layers or experts."""
    return "layers" if LAYERS.fullmatch(field) else "experts" if EXPERTS.fullmatch(field) else None


def _fields(config: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """(path, name, value) of every field, those of nested configs too."""
    for field, value in config.items():
        yield f"{path}{shown(field)}", field, value
        nested = isinstance(value, dict) and field.endswith("config") and field != "quantization_config"
        if nested and depth < MOST_NESTED:
            yield from _fields(value, f"{path}{shown(field)}.", depth + 1)


def _problem(where: str, key: str, value: Any, rule: str) -> LLMCompressError:
    return LLMCompressError(
        f"{where}: {key} is {shown(repr(value))}; {rule}", "config.json and the weights are not of one model"
    )


JSON_NAMES = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}
