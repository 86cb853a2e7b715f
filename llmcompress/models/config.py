"""What a model's config says, wherever in it that is said.

A wrapper (vision-language, audio) keeps the language model's numbers in a config inside its own:

    config.json   {"model_type": "gemma3", "text_config": {"hidden_size": 2560, …}, "vision_config": {…}}
                                            └──────────────── text_config ──────┘

So every number of the language model is read off `text_config(config)`, which is the config itself where there is none
inside. All functions take config.json as a dictionary or transformers' object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INSIDE = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which wrappers keep the config of their language model, as transformers knows them."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer")
WIDTHS = ("hidden_size", "n_embd", "d_model")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k", "top_k",
)  # fmt: skip
"""How mixtures call the number of experts that a token is routed to."""


def text_config(config: Any) -> Any:
    """The language model's config, of the kind that went in.

    >>> text_config({"model_type": "gemma3", "text_config": {"hidden_size": 8}})
    {'hidden_size': 8}
    >>> text_config({"hidden_size": 8})
    {'hidden_size': 8}
    """
    for key in INSIDE:
        inner = _value(config, key)
        if inner is not None and not isinstance(inner, (str, int, float, bool, list)):
            return text_config(inner)
    return config


def max_positions(config: Any) -> int | None:
    """The longest sequence that the model was made for, in tokens; None where its config does not say.

    >>> max_positions({"text_config": {"n_positions": 1024}})
    1024
    """
    return _first_int(config, POSITIONS)


def hidden_size(config: Any) -> int | None:
    """Width of the hidden state; None where the config does not say."""
    return _first_int(config, WIDTHS)


def experts_per_token(config: Any) -> int | None:
    """Experts that a token is routed to; None where the config does not say, as of a dense model.

    >>> experts_per_token({"num_experts_per_tok": 8}), experts_per_token({"hidden_size": 8})
    (8, None)
    """
    return _first_int(config, EXPERTS_PER_TOKEN)


def special_token(config: Any, name: str) -> int | None:
    """`bos_token_id`, `eos_token_id` or `pad_token_id`: the first where there are several, None where there is none."""
    for of in (text_config(config), config):
        value = _value(of, name)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return None


def stored_dtype(config: Any) -> torch.dtype | None:
    """The dtype that the config names; None where it names none that torch has."""
    import torch

    for of in (config, text_config(config)):
        named = _value(of, "dtype") or _value(of, "torch_dtype")
        dtype = getattr(torch, str(named).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None


def is_tied(config: Any) -> bool:
    """Whether the config says that the output shares the input embedding's weight."""
    values = (_value(of, "tie_word_embeddings") for of in (text_config(config), config))
    return next((value for value in values if isinstance(value, bool)), False)


def num_experts(config: Any) -> int:
    """Experts of a mixture; 0 for a model that is none."""
    return _first_int(config, EXPERTS) or 0


def _first_int(config: Any, names: tuple[str, ...]) -> int | None:
    values = (_value(text_config(config), name) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
