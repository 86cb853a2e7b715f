"""A checkpoint cut to a few of its decoder layers, so that an engine can load it in little memory.

    layers 0 1 2 3 4 … 31      cut(folder, out, 4, 6)      out/config.json         num_hidden_layers 2
                                                           out/model.safetensors   layers.4.* as layers.0.*, …

Packed tensors are copied as they are, so the engine unpacks and multiplies the very codes of those layers; embedding,
norm and head go along, so that it runs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.errors import LLMCompressError

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""How configs call the number of decoder layers."""
_NUMBERED = re.compile(r"^(?P<list>.*?)\.(?P<index>\d+)\.")


def layer_list(checkpoint: Checkpoint) -> str:
    """The path of the decoder layers in the files: of numbered modules, those that hold most.

    Raises: LLMCompressError where no tensor is of a numbered module.
    """
    sizes: dict[str, int] = {}
    for stored in checkpoint.stored.values():
        if match := _NUMBERED.match(stored.name):
            sizes[match["list"]] = sizes.get(match["list"], 0) + prod(stored.shape)
    if not sizes:
        raise LLMCompressError(f"{checkpoint.name}: no tensor is of a numbered decoder layer")
    return max(sizes, key=lambda path: (sizes[path], -len(path)))


def cut(checkpoint: Checkpoint, out: Path, start: int, stop: int) -> None:
    """Write the checkpoint with layers start … stop - 1 alone, numbered from 0, into the new folder `out`.

    Raises: LLMCompressError where config.json does not say how many layers there are.
    """
    from safetensors.torch import save_file

    path = layer_list(checkpoint)
    matches = filter(None, map(_NUMBERED.match, checkpoint.stored))
    depth = 1 + max(int(match["index"]) for match in matches if match["list"] == path)
    config = cut_config(checkpoint.config, depth, start, stop, path)
    out.mkdir(parents=True)
    for code in checkpoint.folder.glob("*.py"):
        shutil.copy(code, out)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name in checkpoint.stored:
        match = _NUMBERED.match(name)
        if match and match["list"] == path:
            index = int(match["index"])
            if not start <= index < stop:
                continue
            tensors[f"{path}.{index - start}.{name[match.end() :]}"] = checkpoint.tensor(name)
        else:
            tensors[name] = checkpoint.tensor(name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def cut_config(config: Mapping[str, Any], depth: int, start: int, stop: int, path: str) -> dict[str, Any]:
    """config.json for the cut: its depth, what it lists a layer, and names of modules below `path`.

    >>> cut_config({"n_layer": 4, "kinds": [1, 2, 3, 4], "quantization_config": {"ignore": ["h.1.up", "h.3.up"]}},
    ...            4, 2, 4, "h")
    {'n_layer': 2, 'kinds': [3, 4], 'quantization_config': {'ignore': ['h.1.up']}}

    Raises: LLMCompressError where nothing in it is the number of layers.
    """
    changed = False

    def of(values: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal changed
        found: dict[str, Any] = {}
        for key, value in values.items():
            if key in DEPTHS and value == depth:
                found[key], changed = stop - start, True
            elif isinstance(value, list) and len(value) == depth:
                found[key] = value[start:stop]
            else:
                found[key] = of(value) if isinstance(value, Mapping) and key.endswith("_config") else value
        return found

    quantization = config.get("quantization_config")
    cut_values = of({key: value for key, value in config.items() if key != "quantization_config"})
    if not changed:
        raise LLMCompressError(f"config.json does not say that there are {depth} layers")
    if quantization is not None:
        cut_values["quantization_config"] = _renumbered(quantization, path.rpartition(".")[2], start, stop)
    return cut_values


def _renumbered(value: Any, last: str, start: int, stop: int) -> Any:
    """The value with names of modules (`layers.7.`, `layers\\.7\\.`) counted from `start`; those outside left out."""
    name = re.compile(rf"(?P<head>\b{re.escape(last)}\\?\.)(?P<index>\d+)(?P<tail>\\?\.)")

    def outside(text: Any) -> bool:
        match = name.search(text) if isinstance(text, str) else None
        return match is not None and not start <= int(match["index"]) < stop

    if isinstance(value, str):
        return name.sub(lambda match: f"{match['head']}{int(match['index']) - start}{match['tail']}", value)
    if isinstance(value, list):
        return [_renumbered(item, last, start, stop) for item in value if not outside(item)]
    if isinstance(value, dict):
        pairs = ((key, item) for key, item in value.items() if not outside(key))
        return {_renumbered(key, last, start, stop): _renumbered(item, last, start, stop) for key, item in pairs}
    return value
