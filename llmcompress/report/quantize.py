"""What quantizing did: the calibration set, every linear, where the time went, tuning, and the files written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.report.part import Part

PLAIN, ADAPTER = "plain", "peft"
"""Output.format of a checkpoint without quantized weights, and of an adapter's folder."""


class Calibration(Part):
    """The text that Hessians were taken from. Written by quantize; absent for data-free methods."""

    name: str
    source: str = Field(description="file name or dataset id and revision")
    license: str | None = None
    num_samples: int
    seq_len: int
    num_tokens: int = Field(description="real tokens, padding not counted")
    chat_template: bool
    seed: int
    sha256: str = Field(description="of the token ids and the mask")


class LinearRow(Part):
    """One linear. Written by quantize; a linear left alone has outcome skipped and a reason."""

    name: str = Field(description="module path, e.g. model.layers.0.mlp.down_proj")
    shape: tuple[int, int] = Field(description="out_features, in_features")
    scheme: str | None = Field(description="WeightGrid.label(); None when skipped")
    grid: dict[str, int | bool | str | None] | None = Field(default=None, description="the fields of that WeightGrid")
    tensor_prefix: str | None = Field(default=None, description="what the packed tensors' names begin with")
    method: str | None
    outcome: Literal["quantized", "fell_back", "skipped"]
    reason: str | None = Field(default=None, description="why it fell back or was skipped")
    relative_error: float | None = Field(
        default=None, description="||(W-Q)X||^2 / ||WX||^2 over the calibration tokens; ||W-Q||^2/||W||^2 without any"
    )
    error_kind: Literal["output", "weight"] | None = None
    solution: Literal["plain", "refined", "asymmetric"] = Field(
        default="plain",
        description="the method's own solution, its refinement, or the asymmetric one",
    )
    held_out_error: float | None = Field(
        default=None, description="relative output error on calibration tokens kept from the solver"
    )
    plain_held_out_error: float | None = Field(
        default=None, description="the same of the plain version; another is kept only where it lowers it"
    )
    num_tokens: int | None = Field(default=None, description="calibration tokens that reached this linear")
    num_routed_tokens: int | None = Field(
        default=None,
        description="of an expert: those that the router sent to it",
    )
    digest: str | None = Field(default=None, description="sha256 of codes, scales and zero points, before packing")
    notes: list[str] = []


class Profile(Part):
    """How the layers were quantized, where the time went, and how much of the machine was used. Written by quantize."""

    schedule: Literal["staged", "recomputed"] = Field(
        description="staged: every linear ran once a batch; recomputed: batches ran up to each anew, to save memory"
    )
    activations: Literal["memory", "disk"] = Field(description="where hidden states lay between layers")
    reason: str | None = Field(default=None, description="why not staged and in memory")
    num_processes: int = 1
    num_worse: int = Field(default=0, description="linears whose held-out error is above that of the plain version")
    seconds: dict[str, float] = Field(description="by phase, each without what runs inside it as another phase")
    flops: dict[str, float] = Field(description="by phase, the least that the work takes; of this process")
    matmul_flops_per_s: float = Field(description="of a large float32 matrix product on this machine")


class Tuning(Part):
    """Codes and scales tuned end to end. Written by quantize with effort max."""

    num_steps: int
    num_scales: int
    num_codes: int = 0
    num_codes_changed: int = Field(0, description="of num_codes, by tuning; counted also where it was not kept")
    num_held_out_tokens: int
    held_out_kl_before: float = Field(description="nats per token, on calibration rows that were not trained on")
    held_out_kl_after: float = Field(description="the same with what was tuned as the file holds them")
    kept: bool = Field(description="whether what was tuned is in the checkpoint: only where they are better")


class Output(Part):
    """The checkpoint that came out. Written by quantize."""

    format: str
    files: dict[str, int] = Field(description="file name -> bytes, weights and index only")
    digests: dict[str, str] = Field(description="file name -> sha256")
    weights_bytes: int
    bits_per_weight: float = Field(
        description="of the quantized linears: codes, scales and zero points, over their weights"
    )
    bits_per_weight_model: float = Field(description="of the whole checkpoint")
    quantized_parameters: int
    total_parameters: int
