"""What a model is for, which decides how it is loaded, what its predictions are, and how training text becomes rows.

    kind            transformers' class                     predictions that are matched
    causal          AutoModelForCausalLM                    the next token's distribution, at every token
    masked          AutoModelForMaskedLM                    the distribution at the masked tokens
    classification  AutoModelForSequenceClassification      the classes of a text
    embedding       AutoModel, pooled as 1_Pooling says     none: the pooled vector itself

The kind is read from `architectures` in config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError

Kind = Literal["causal", "masked", "classification", "embedding"]
ENDINGS: dict[str, Kind] = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "classification",
    "Model": "embedding",
}
"""How the name of an architecture ends -> what it is for; the first ending that fits counts."""
CLASSES: dict[Kind, str] = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


def kind_of(checkpoint: Checkpoint) -> Kind:
    """What the checkpoint is for.

    Raises: LLMCompressError when its config names no architecture, or one of another kind.
    """
    names = checkpoint.config.get("architectures") or []
    for name in names:
        for ending, kind in ENDINGS.items():
            if str(name).endswith(ending):
                return kind
    shown = ", ".join(map(str, names)) or "nothing"
    raise LLMCompressError(
        f"{checkpoint.name}: architectures in config.json is {shown}, which cannot be distilled",
        f"a model that ends in one of {', '.join(ENDINGS)} can",
    )


def auto_class(kind: Kind) -> Any:
    """transformers' class that loads a model of this kind."""
    import transformers

    return getattr(transformers, CLASSES[kind])


def pooling_of(folder: Path) -> str:
    """How a sentence encoder makes one vector of a text: `mean` over its tokens, or the `first` one.

    Raises: LLMCompressError for another way.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    asked = [key for key, value in json.loads(path.read_text(encoding="utf-8")).items() if value is True]
    ways = [POOLINGS[key] for key in asked if key in POOLINGS]
    others = [key for key in asked if key.startswith("pooling_mode_") and key not in POOLINGS]
    if len(ways) != 1 or others:
        raise LLMCompressError(f"{path}: pooling by {', '.join(asked)}; mean and cls_token, one of them, are supported")
    return ways[0]
