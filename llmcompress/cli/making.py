"""What every verb that makes a checkpoint takes beside its own options, said once: `@making` adds it to the signature.

@guarded
@making
def quantize(model: Model, output: Out, …, common: Making) -> int:      llmcompress quantize MODEL -o OUT … --seed 1
    return common.run(model, output, stages)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from llmcompress.cli.options import Json, Overrides, Overwrite, Pickle, Revision, Seed, Trust
from llmcompress.cli.running import run_stages


@dataclass(frozen=True)
class Making:
    """The common options, as they were given."""

    seed: Seed = 0
    revision: Revision = None
    trust_remote_code: Trust = False
    allow_pickle: Pickle = False
    overwrite: Overwrite = False
    overrides: Overrides = None
    as_json: Json = False

    def recipe(self, model: str, output: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The recipe that a verb stands for."""
        head = {"model": model, "output": str(output), "seed": self.seed, "revision": self.revision}
        head |= {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}
        return head | {"stages": list(stages)}

    def run(self, model: str, output: Path, stages: Sequence[Mapping[str, Any]]) -> int:
        """Run it, print what came of it, and give the exit code."""
        recipe = self.recipe(model, output, stages)
        return run_stages(recipe, self.overrides, self.as_json, overwrite=self.overwrite)


def making(verb: Callable[..., int]) -> Callable[..., int]:
    """The verb with the common options in the place of its parameter `common`, the last one."""
    hints = get_type_hints(Making, include_extras=True)
    common = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(Making)
    ]
    own = list(inspect.signature(verb, eval_str=True).parameters.values())
    assert own[-1].name == "common", "the last parameter"

    @functools.wraps(verb)
    def run_verb(**said: Any) -> int:
        found = Making(**{one.name: said.pop(one.name) for one in common})
        return verb(**said, common=found)

    signature = inspect.Signature([*own[:-1], *common], return_annotation=int)
    run_verb.__signature__ = signature  # type: ignore[attr-defined]
    run_verb.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    return run_verb
