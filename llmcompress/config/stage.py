"""A stage: one step of a recipe, with all that the rest of the program has to know of it in one object.

    Settings     what a user may ask: recipe keys, command-line options, `--help` and defaults come from it
    problems     what is wrong with the settings alone, found before anything is opened
    fingerprint  what the names in the settings stand for (the bytes of a text, of a suite), so that other text is
                 another run
    run          the work: a transform writes a checkpoint into `work.out`, a check fills its part of `work.report`
    summary      the lines that a run prints of it; `failures` is why its exit code is 1

A transform maps a checkpoint to a checkpoint (or to an adapter, which `merge` turns into one); a check maps a
checkpoint to rows of the report. Adding a stage is a class in its folder's `stages.py` and a line in `STAGES`.
Importing such a module is cheap: settings only; engines are imported by `run`.
"""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmcompress.errors import LLMCompressError, unknown

if TYPE_CHECKING:
    from pydantic import BaseModel

    from llmcompress.checkpoint.reader import Checkpoint
    from llmcompress.console import Progress
    from llmcompress.data.settings import DataSettings
    from llmcompress.report import RunReport

STAGES = {
    "finetune": "llmcompress.finetune.stages:Finetune",
    "merge": "llmcompress.finetune.stages:Merge",
    "distill": "llmcompress.distill.stages:Distill",
    "quantize": "llmcompress.compress.stages:Quantize",
    "verify": "llmcompress.verify.stages:Verify",
    "check": "llmcompress.verify.stages:Check",
    "evaluate": "llmcompress.evaluate.stages:Evaluate",
    "measure": "llmcompress.evaluate.stages:Measure",
    "card": "llmcompress.card.stages:Card",
}
"""Name -> where its class is. Checks run in this order, after the transforms, which run in the order of the recipe."""


class Stage(ABC):
    """One kind of step; see the module's docstring. Instances hold no state.

    kind: transforms make a checkpoint, checks report on one. makes_adapter: what it makes is an adapter, still to be
    merged. takes_adapter: it can work on an adapter's folder. trains: the checkpoint has learned from `settings.data`,
    so that a later quantization is calibrated on the same rows unless told otherwise. always: it is run anew even where
    the report has it.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["transform", "check"]]
    help: ClassVar[str]
    Settings: ClassVar[type[BaseModel]]
    makes_adapter: ClassVar[bool] = False
    takes_adapter: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    always: ClassVar[bool] = False

    def problems(self, settings: Any) -> list[LLMCompressError]:
        """What is wrong with the settings, as far as they alone can tell; each message starts with the key."""
        return []

    def fingerprint(self, settings: Any, context: Context) -> str:
        """What the names in the settings stand for, as text that goes into the key of the work.

        Raises: LLMCompressError, all problems together, for a name that is unknown or a file that is broken.
        """
        return ""

    def outputs(self, settings: Any, out: Path) -> list[Path]:
        """The folders of checkpoints that a transform writes when told to write to `out`."""
        return [out]

    def one_output(self, settings: Any) -> Any:
        """Settings for the same work with a single output, where it may have several."""
        return settings

    @abstractmethod
    def run(self, settings: Any, work: Work) -> None:
        """Do it. Raises: LLMCompressError for anything a user can mend; a transform's output is then not there."""

    def training_data(self, settings: Any, report: RunReport | None) -> DataSettings | None:
        """The rows that the checkpoint has learned from by this stage, where it knows them."""
        return None

    def follow_up(self, settings: Any, work: FollowUp) -> None:  # noqa: B027 - most transforms ask nothing
        """Look at what the transform right after this one made, and write what was learned into its reports.

        Called on every run, so it returns at once where the reports have it already.
        """

    def summary(self, report: RunReport) -> list[str]:
        """The lines of a run's summary, each `  topic    text`."""
        return []

    def rows(self, settings: Any, report: RunReport) -> list[Any] | None:
        """The rows of the report that a check has filled, which its verb in Python gives back; None: it has none."""
        return None

    def failures(self, report: RunReport) -> list[str]:
        """Why the run failed, a line each; empty where it did not."""
        return []


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of one recipe with its settings."""

    stage: Stage
    settings: Any

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def transforms(self) -> bool:
        """Whether it makes a checkpoint."""
        return self.stage.kind == "transform"


@dataclass(frozen=True, slots=True)
class Context:
    """What a fingerprint may depend on beside the settings: the recipe's model, the transforms before it in the recipe,
    and how a checkpoint is opened."""

    model: str
    open: Callable[[str], Checkpoint]
    before: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A transform that is done: its step, its key, the folders that it wrote, and the report of the first."""

    step: Step
    key: str
    folders: tuple[Path, ...]
    report: RunReport


@dataclass(slots=True)
class Work:
    """What a stage is given.

    checkpoint: what goes into a transform, or what the output of a check's recipe is compared with (the recipe's
    model). out: the folder to write, or to take evidence of. adapter: the folder of an adapter trained on `checkpoint`
    that is still to be merged. key: names this very work; what a killed run left under the same key is continued.
    open: a checkpoint by name, with what this run consents to. record: whether the report is kept in `out`.
    """

    checkpoint: Checkpoint
    out: Path
    report: RunReport
    key: str
    seed: int
    progress: Progress
    open: Callable[[str], Checkpoint]
    adapter: Path | None = None
    before: Sequence[Finished] = field(default_factory=tuple)
    record: bool = True
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True)
class FollowUp:
    """What `Stage.follow_up` is given.

    source: what went into the transform that asks. mine: what it made; later: what the one after it made of that.
    again: the later transform, run on another checkpoint into another folder. scratch: a folder name that is free.
    """

    source: str
    mine: Finished
    later: Finished
    again: Callable[[Checkpoint, Path], None]
    scratch: Path
    seed: int
    progress: Progress
    open: Callable[[str], Checkpoint]
    save: Callable[[RunReport, Path], None]


@cache
def stage(name: str) -> Stage:
    """The stage called `name`, imported on first use. Raises: LLMCompressError for an unknown name."""
    if name not in STAGES:
        raise unknown("stage", name, STAGES)
    module, _, attribute = STAGES[name].partition(":")
    made: Stage = getattr(importlib.import_module(module), attribute)()
    assert made.name == name, f"{STAGES[name]} calls itself {made.name!r}"
    return made


def stages(kind: Literal["transform", "check"] | None = None) -> list[Stage]:
    """All stages, or those of a kind, in their order."""
    return [stage(name) for name in STAGES if kind in (None, stage(name).kind)]


def settings_class(name: str) -> type[BaseModel]:
    """The settings of a stage."""
    return stage(name).Settings


def rank(name: str) -> int:
    """Where a stage stands in a recipe: transforms share the first place, checks have each their own."""
    return 0 if stage(name).kind == "transform" else 1 + list(STAGES).index(name)


def sha256(content: str | bytes) -> str:
    """Hex digest of bytes, or of a text's UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
