"""A tiny random checkpoint of any language model that transformers can build, and what becomes of it when quantized.

config class ──> tiny config (sizes by the names of its fields) ──> random model ──> checkpoint
                                                                                        │
plain transformers' logits = our dequantization's? <── load as declared <── check <── quantize (or refused by name)
"""

from __future__ import annotations

import copy
import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.compress.dequantized import load_dequantized
from llmcompress.compress.layerwise import quantize
from llmcompress.compress.settings import QuantizeSettings
from llmcompress.console import Silent
from llmcompress.errors import LLMCompressError
from llmcompress.models.config import num_experts, text_config
from llmcompress.report import RunReport, environment
from llmcompress.verify.check import check
from llmcompress.verify.settings import CheckSettings

VOCABULARY = 128
MOST_PARAMETERS = 60_000_000
SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"),
    64: (
        "hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size", "lru_width", "hidden_dim",
        "out_hidden_size", "attention_hidden_size", "projection_dim", "embedding_dim", "proj_hidden_size", "backbone_hidden_size",
        "output_dim", "encoder_hidden_size", "decoder_hidden_size", "mm_hidden_size", "aligner_projection_size", "vision_hidden_size",
    ),
    128: (
        "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim",
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "expand_size", "shared_intermediate_size",
        "block_ff_dim", "mamba_intermediate_size", "mlp_hidden_size", "intermediate_size_mlp", "prefix_dense_intermediate_size",
        "max_target_positions", "max_source_positions", "dim_ff", "conv_dim", "max_sequence_length",
    ),
    32: (
        "moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "sliding_window", "attention_window_size", "window_size",
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "decay_low_rank_dim", "gate_low_rank_dim",
        "hidden_size_per_layer_input", "altup_num_inputs_", "chunk_size", "mamba_chunk_size", "attention_chunk_size",
        "local_attention", "moe_latent_size", "linear_key_dim", "index_head_dim", "o_lora_rank", "num_mel_bins",
        "time_step_rank", "a_low_rank_dim", "v_low_rank_dim", "image_size", "image_seq_length", "sample_size",
    ),
    16: (
        "head_dim", "v_head_dim", "mamba_d_state", "state_size", "linear_key_head_dim", "linear_value_head_dim", "d_kv",
        "mamba_head_dim", "mamba_headdim", "rotary_dim", "global_head_dim", "ssm_state_size", "mamba_d_head",
        "index_topk", "key_head_dim", "swa_head_dim", "patch_size",
    ),
    8: ("qk_rope_head_dim", "qk_nope_head_dim", "n_groups_", "mm_tokens_per_image", "num_position_embeddings_"),
    4: (
        "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "n_heads",
        "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "mamba_n_heads", "attention_heads",
        "linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "swa_num_attention_heads", "linear_num_heads",
        "index_n_heads", "num_global_attention_heads", "num_swa_attention_heads", "ngram",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
        "num_key_value_heads", "num_experts_per_tok", "moe_k", "moe_topk", "num_decoder_layers", "num_encoder_layers",
        "num_attention_groups", "num_query_groups", "swa_num_key_value_heads", "num_global_key_value_heads", "num_kv_heads",
        "num_memory_blocks", "decoder_attention_layers", "n_head_kv", "num_kv_shared_layers_", "vision_num_layers",
    ),
    1: (
        "n_group", "topk_group", "first_k_dense_replace", "n_groups", "mamba_n_groups", "n_shared_experts", "mtp_num_layers_",
        "num_mem_blocks", "moe_layer_start_index", "num_nextn_predict_layers", "num_ln_in_parallel_attn_",
    ),
    0: ("num_kv_shared_layers", "pad_token_id"),
}  # fmt: skip
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"hidden_size": 128, "head_dim": 32},
    {"num_hidden_layers": 4, "n_layer": 4},
    {"num_key_value_heads": 1},
    {"hidden_size": 256, "head_dim": 64},
    {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4},
    {"hidden_size": 512, "head_dim": 128},
)
OWN: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 16},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2": {"full_attn_idxs": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "opt": {"word_embed_proj_dim": 64},
}
"""What the names of fields do not tell, by model type."""

Outcome = Literal["works", "refused", "not built", "traceback", "does not load", "differs"]


@dataclass(frozen=True)
class Trial:
    """What became of one architecture. checked: what `check` said of transformers before it was loaded."""

    model_type: str
    architecture: str
    kind: str
    outcome: Outcome
    detail: str
    num_linears: int = 0
    checked: bool | None = None


def every_type() -> list[str]:
    """Every model type of transformers that is a causal language model or a wrapper around one."""
    from transformers.models.auto import modeling_auto as auto

    return sorted({*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def tiny_config(kind: type, model_type: str, changes: dict[str, Any]) -> Any:
    """A config of a class with small sizes in every field whose name is known; nested ones as well."""
    default = kind()
    sizes = {name: size for size, names in SIZES.items() for name in names} | {"bos_token_id": 1, "eos_token_id": 2}
    sizes |= changes
    given: dict[str, Any] = {}
    for name in [*vars(default), *getattr(kind, "attribute_map", {})]:
        try:
            value = getattr(default, name, None)
        except Exception:  # noqa: BLE001 - a model's own code raises all kinds
            value = None
        if name in sizes and (isinstance(value, (int, type(None))) and not isinstance(value, bool)):
            if value is not None or (
                sizes[name] is not None and name in ("num_key_value_heads", "head_dim", "n_inner")
            ):
                given[name] = sizes[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            given[name] = VOCABULARY - 2 - sum(key.endswith(("_token_id", "_token_index")) for key in given)
        elif name.endswith("_token_id") and isinstance(value, list):
            given[name] = [VOCABULARY - 2]
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        inner = None if isinstance(inner, dict) else inner
        if inner is not None:
            given[name] = tiny_config(type(inner), inner.model_type, changes).to_dict()
    given |= OWN.get(model_type, {})
    mapped = getattr(kind, "attribute_map", {})
    given = {name: value for name, value in given.items() if mapped.get(name, name) not in given or name not in mapped}
    return kind(**{name: value for name, value in given.items() if value is not None})


def model_class(model_type: str) -> Any:
    """transformers' class for the type: the causal language model's, for wrappers their own."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    names = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    name = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type) or names[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build(model_type: str) -> Any:
    """A random tiny model that runs on tokens. Raises: whatever the last variant met."""
    from transformers import CONFIG_MAPPING

    errors: list[Exception] = []
    for changes in VARIANTS:
        try:
            torch.manual_seed(0)
            config = tiny_config(CONFIG_MAPPING[model_type], model_type, changes)
            with torch.device("meta"):
                drawn = model_class(model_type)._from_config(copy.deepcopy(config))
            size = sum(parameter.numel() for parameter in drawn.parameters())
            if size > MOST_PARAMETERS:
                raise RuntimeError(f"{size} parameters: its sizes are called by names that are not known here")
            model = model_class(model_type)._from_config(config).float().eval()
            _randomize(model)
            if not model.config.is_encoder_decoder:
                logits = logits_of(model)
                assert bool(torch.isfinite(logits).all()), "logits are not finite"
            return model
        except Exception as met:  # noqa: BLE001 - a model's own code raises all kinds
            errors.append(met)
    raise errors[0]


def _randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif parameter.dim() > 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0, 0].numel() ** -0.5)
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def config_of(folder: Path) -> Any:
    """transformers' config of a folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def logits_of(model: Any) -> torch.Tensor:
    """float32 logits of sixteen tokens."""
    tokens = torch.randint(3, 90, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return found


def kind_of(config: Any) -> str:
    """decoder, mixture, wrapper (of either), encoder-decoder or encoder."""
    text = text_config(config)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return "encoder-decoder"
    from transformers import AutoModelForMaskedLM

    if type(text) in AutoModelForMaskedLM._model_mapping and not getattr(text, "is_decoder", False):
        return "encoder"
    mixture = "mixture" if num_experts(text) > 1 else "decoder"
    return mixture if text is config else f"{mixture} in a wrapper"


def attempt(model_type: str, folder: Path) -> Trial:
    """Quantize, check, load and compare one architecture below `folder`; never raises."""
    try:
        model = build(model_type)
    except Exception as error:  # noqa: BLE001 - a model's own code raises all kinds
        return Trial(model_type, "", "", "not built", _line(error))
    kind, name = kind_of(model.config), type(model).__name__
    expert = any(p.dim() > 2 and ("expert" in n or "moe" in n) for n, p in model.named_parameters())
    kind = kind.replace("decoder", "mixture") if expert and "encoder" not in kind else kind
    source, out = folder / "source", folder / "out"
    try:
        model.save_pretrained(source)
    except Exception as error:  # noqa: BLE001 - a model's own code raises all kinds
        return Trial(model_type, name, kind, "not built", f"save_pretrained: {_line(error)}")
    settings = QuantizeSettings(method="rtn", group_size=32, format=["compressed_tensors"])
    try:
        made = quantize(Checkpoint.open(source), out, settings, seed=0, key="", report=report(), progress=Silent())
    except LLMCompressError as error:
        assert not out.exists()
        return Trial(model_type, name, kind, "refused", error.message.replace(f"{source}: ", ""))
    except Exception as error:  # noqa: BLE001 - a model's own code raises all kinds
        return Trial(model_type, name, kind, "traceback", _line(error))
    count = sum(row.outcome == "quantized" for row in made.linears)
    checked = check(out, CheckSettings(engine="transformers"))[0].loads
    try:
        loaded, info = type(model).from_pretrained(out, output_loading_info=True, dtype=torch.float32)
        lacking = [*info["missing_keys"], *info["mismatched_keys"]]
        assert not lacking, f"missing: {lacking[0]}"
        theirs = logits_of(loaded.eval())
    except Exception as error:  # noqa: BLE001 - a model's own code raises all kinds
        return Trial(model_type, name, kind, "does not load", _line(error), count, checked)
    try:
        ours = logits_of(load_dequantized(out))
    except Exception as error:  # noqa: BLE001 - a model's own code raises all kinds
        return Trial(model_type, name, kind, "traceback", f"our reader: {_line(error)}", count, checked)
    error_of = float((ours - theirs).norm() / theirs.norm())
    outcome: Outcome = "works" if error_of < 1e-3 else "differs"
    return Trial(model_type, name, kind, outcome, "" if outcome == "works" else f"by {error_of:.2g}", count, checked)


def attempt_and_clean(model_type: str, folder: Path) -> Trial:
    """`attempt`, leaving nothing below `folder`."""
    try:
        return attempt(model_type, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report() -> RunReport:
    """An empty report."""
    return RunReport(created="2026-01-01T00:00:00+00:00", recipe={}, seed=0, environment=environment.describe())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def table(trials: list[Trial], version: str) -> str:
    """What came of all trials, as Markdown."""
    built = [trial for trial in trials if trial.outcome != "not built"]
    decoders = [trial for trial in built if trial.kind in ("decoder", "decoder in a wrapper")]
    works = [trial for trial in decoders if trial.outcome == "works"]
    wrong = [trial for trial in built if trial.outcome in ("traceback", "does not load", "differs")]
    passed = [trial for trial in wrong if trial.checked]
    share = f"{len(works) / len(decoders):.1%}" if decoders else "none"
    mixtures = [trial for trial in built if "mixture" in trial.kind]
    refused = [trial for trial in built if trial.outcome == "refused"]
    failing = [trial for trial in built if trial.outcome in ("does not load", "differs")]
    statements = [
        f"A tiny random checkpoint of every language model of transformers {version} that could be built so, alone or in "
        "a wrapper (vision-language, audio): quantized to W4A16 in groups of 32 by rtn as compressed_tensors, checked, "
        "loaded by plain transformers as the class that its config.json declares, its logits held against our own "
        "reading of the files.",
        f"- **{len(works)} of {len(decoders)} decoder-only models ({share}) work**: they quantize, load and agree. Of "
        f"{len(mixtures)} mixtures of experts, {sum(trial.outcome == 'works' for trial in mixtures)} do.",
        f"- {len(refused)} of {len(built)} are refused by name before any work ({_counts(refused)}).",
        f"- {len(failing)} do not load in transformers ({_counts(failing) or 'none'}); {len(passed)} of them pass `check`.",
        f"- {sum(trial.outcome == 'traceback' for trial in built)} end in a traceback.",
        f"- {len(trials) - len(built)} types were not built tiny: another input than tokens alone, a package that is not "
        "installed, or sizes whose names are not known here. They are named below the table.",
    ]
    lines = ["# Architectures", "", "```bash", "scripts/architectures > eval/results/architectures.md", "```", ""]
    for number, statement in enumerate(statements):
        lines += textwrap.wrap(statement, 118, subsequent_indent="  " * (number > 0), break_on_hyphens=False)
        lines += [""] if number == 0 else []
    lines += ["", "| type | class | kind | outcome | linears | note |", "|---|---|---|---|---|---|"]
    for trial in built:
        note = trial.detail.replace("|", "/")
        note = note if len(note) <= 160 else note[:157] + "…"
        cells = (trial.model_type, trial.architecture, trial.kind, trial.outcome, trial.num_linears or "", note)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    left = "Not built: " + ", ".join(trial.model_type for trial in trials if trial.outcome == "not built") + "."
    lines += ["", *textwrap.wrap(left, 118, break_on_hyphens=False)]
    return "\n".join(lines)


def _counts(trials: list[Trial]) -> str:
    counts = Counter(trial.kind for trial in trials)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
