"""Reports of older versions brought up to this one: a table of the keys renamed, and fields that took a phrase's place.

version 1   keys in the words of the first edition: licence, survival, overlaps …
version 2   license, adapter_retention, contamination …; `kernels` in place of a phrase in engine_note
"""

from __future__ import annotations

from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    "": {"survival": "adapter_retention", "work": "profile"},
    "source": {"licence": "license", "licence_name": "license_name", "licence_link": "license_link"},
    "calibration": {"licence": "license"},
    "linears": {"stem": "tensor_prefix", "version": "solution"},
    "work": {"form": "schedule", "ideal_flops_per_s": "matmul_flops_per_s"},
    "finetune": {"kept_full": "full_precision_linears", "heldout_loss_start": "heldout_loss_initial"},
    "finetune.data": {"num_learned": "num_loss_tokens", "heldout_also_trained": "num_heldout_in_training"},
    "finetune.data.rejected": {"places": "locations"},
    "merge": {"round_tripped": "num_nf4_linears", "replaced": "replaced_parameters"},
    "merge.adapters": {"base_is_this": "base_matches"},
    "merge.linears": {"excess": "error_over_rounding"},
    "distillation.data": {"num_learned": "num_loss_tokens", "heldout_also_trained": "num_heldout_in_training"},
    "distillation.data.rejected": {"places": "locations"},
    "distillation.cache": {
        "num_kept": "top_k",
        "mean_rest": "mean_tail_mass",
        "largest_rest": "max_tail_mass",
    },
    "distillation.on_policy": {"own_batches": "student_batches", "own_tokens": "student_tokens"},
    "evaluations": {"overlaps": "contamination", "overlap_allowed": "contamination_allowed"},
    "evaluations.texts": {"shared_entries": "shared_vocabulary"},
    "evaluations.overlaps": {"num_short": "num_too_short", "num_found": "num_contaminated"},
    "speed.rows": {"memory_before_bytes": "memory_before_load_bytes"},
}
"""Part of a report of version 1 -> its keys then -> their names in version 2."""
DEQUANTIZED = "our dequantized weights"
"""What engine_note began with in version 1 where the engine's own kernels did not run."""


def upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """A report of version 1, as JSON gives it, as one of version 2; `data` stays as it is."""
    upgraded: dict[str, Any] = _renamed(data, "")
    for row in upgraded.get("linears", []):
        if row.get("solution") == "aimed":
            row["solution"] = "asymmetric"
    for row in (*upgraded.get("evaluations", []), *((upgraded.get("speed") or {}).get("rows", []))):
        row["kernels"] = "dequantized" if row["engine_note"].startswith(DEQUANTIZED) else "native"
    return upgraded | {"version": 2}


def _renamed(value: Any, part: str) -> Any:
    """`value`, found at `part`, with the keys of every part below it renamed; rows of a list are at the list's part."""
    if isinstance(value, list):
        return [_renamed(row, part) for row in value]
    if not isinstance(value, dict):
        return value
    names = RENAMED.get(part, {})
    return {names.get(key, key): _renamed(below, f"{part}.{key}".lstrip(".")) for key, below in value.items()}
