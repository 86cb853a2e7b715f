"""The declaration of a calibration set: what may stand in `calibration/NAME.yaml`, and how a set is found by name.

    name: wizard                              num_samples: 128      rows
    description: a novel, for plain English   seq_len: 512          tokens per row
    text: wizard.txt     (beside the YAML)    seed: 0               order of the documents
    licence: Apache-2.0                       chat_template: false
    sha256: 5f2c…        (of the text file)   field: text           of a .jsonl line or a dataset row

or, in place of `text`, `dataset: {path, name, split, revision}`. Free of torch, so that recipes load at once.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator

from llmcompress import resources
from llmcompress.config.validation import from_yaml
from llmcompress.data.sources import ACCEPTED, SUFFIXES
from llmcompress.errors import LLMCompressError, unknown

CHAT_FIELD = "messages"
YAML_SUFFIXES = (".yaml", ".yml")
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
OWNED_HUB_ID = r"\w[\w.-]*/\w[\w.-]*"


class Dataset(BaseModel):
    """A split of a Hub dataset (or of a local folder of data files)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    path: str = Field(min_length=1, description="Hub dataset id, or a folder")
    name: str | None = Field(None, description="configuration of the dataset")
    split: str = Field(min_length=1)
    revision: str | None = Field(None, description="commit, tag or branch")


class CalibrationSpec(BaseModel):
    """A calibration set as declared; see the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    description: str = ""
    text: str | None = Field(None, description=f"a file beside the YAML, one of {', '.join(SUFFIXES)}")
    dataset: Dataset | None = Field(None, validate_default=True)
    field: str = Field("text", min_length=1, description="of a .jsonl line or a dataset row; messages = conversations")
    chat_template: bool = Field(False, description="render with the tokenizer's template, one document per row")
    num_samples: int = Field(128, ge=1, description="rows")
    seq_len: int = Field(512, ge=2, description="tokens per row")
    seed: int = Field(0, ge=0, description="order of the documents")
    licence: str | None = Field(None, description="of the text, as an SPDX name")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the bytes of the text file")

    _folder: Path = PrivateAttr(default=Path())

    @field_validator("text")
    @classmethod
    def _known_suffix(cls, text: str | None) -> str | None:
        if text is not None and Path(text).suffix not in SUFFIXES:
            raise ValueError(f"must end in one of {', '.join(SUFFIXES)}")
        return text

    @field_validator("dataset")
    @classmethod
    def _one_source(cls, dataset: Dataset | None, info: ValidationInfo) -> Dataset | None:
        if "text" in info.data and (info.data["text"] is None) == (dataset is None):
            raise ValueError("exactly one of `text` and `dataset` must be given")
        return dataset

    @field_validator("field")
    @classmethod
    def _field_has_a_place(cls, field: str, info: ValidationInfo) -> str:
        if field != "text" and str(info.data.get("text")).endswith(".txt"):
            raise ValueError("a .txt file has no fields; other files and datasets have")
        return field

    @field_validator("sha256")
    @classmethod
    def _sha256_has_a_file(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        if sha256 is not None and info.data.get("dataset") is not None:
            raise ValueError("belongs to a `text` file; pin a dataset by its `revision`")
        return sha256

    @property
    def names_field(self) -> bool:
        """Whether the set says which field holds its text; where it does not, rows without `text` are read by kind."""
        return "field" in self.model_fields_set

    @property
    def chat(self) -> bool:
        """Whether documents are conversations, rendered with the tokenizer's chat template."""
        return self.chat_template or self.field == CHAT_FIELD

    @property
    def text_file(self) -> Path:
        """The text file, where there is one, resolved against the folder of the YAML."""
        assert self.text is not None, "a set of a dataset has no text file"
        return self._folder / self.text

    @property
    def source(self) -> str:
        """File name, or dataset id with configuration, split and revision; of a local path only its last part."""
        if self.dataset is None:
            return self.text_file.name
        of = self.dataset
        shown = of.path if re.fullmatch(HUB_ID, of.path) else Path(of.path).name
        revision = f", revision {of.revision}" if of.revision else ""
        return f"{shown}{f' ({of.name})' if of.name else ''}, split {of.split}{revision}"

    @classmethod
    def choose(cls, name_or_path: str | None, model: str) -> CalibrationSpec:
        """The set asked for; when none was, that of the same name as a bundled model, which speaks its language.

        Raises: LLMCompressError when none was asked for and the model is not a bundled one, and as `find`.
        """
        if name_or_path is not None:
            return cls.find(name_or_path)
        if model.startswith(resources.BUNDLED):
            return cls.find(model.removeprefix(resources.BUNDLED))
        raise LLMCompressError(
            "calibration: must be given; what a model is calibrated on decides what it keeps",
            "pass --calibration FILE.txt with text such as it will see, or wikitext2 (fetched from the Hub)",
        )

    @classmethod
    def find(cls, name_or_path: str) -> CalibrationSpec:
        """The set of a bundled name, of a YAML file, or, with default settings, of a text file or a Hub dataset
        (`org/name`, its split `train`).

        Raises: LLMCompressError for a name nobody knows and a missing file, and one for each problem in a YAML.
        """
        bundled = {path.stem: path for path in resources.folder("calibration").glob("*.yaml")}
        if name_or_path in bundled:
            return cls.read(bundled[name_or_path])
        path = Path(name_or_path)
        if path.suffix not in (*YAML_SUFFIXES, *SUFFIXES):
            if re.fullmatch(OWNED_HUB_ID, name_or_path) and not path.exists():
                return cls.model_validate({"name": name_or_path, "dataset": {"path": name_or_path, "split": "train"}})
            error = unknown("calibration set", name_or_path, bundled)
            error.hint = error.hint or f"name a bundled set, or give a .yaml, {ACCEPTED.removeprefix('a ')}"
            raise error
        if not path.is_file():
            raise LLMCompressError(f"{path}: no such file", f"give a calibration set, a .yaml, {ACCEPTED}")
        if path.suffix in YAML_SUFFIXES:
            return cls.read(path)
        spec = cls.model_validate({"name": path.stem, "text": path.name})
        spec._folder = path.parent
        return spec

    @classmethod
    def read(cls, path: Path) -> CalibrationSpec:
        """The set that a YAML file declares; its text lies beside the file.

        Raises: LLMCompressError for a file that is not YAML, and one with its line for each problem.
        """
        spec, _ = from_yaml(cls, path)
        spec._folder = path.parent
        return spec
