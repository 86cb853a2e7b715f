"""Tiny random checkpoints, one per architecture, made where a test asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configs() -> dict[str, Any]:
    """Architecture name -> a tiny config of it."""
    import transformers as t

    gqa = {**SHAPE, "head_dim": 16}
    mha = {**SHAPE, "num_key_value_heads": 4}
    gpt2 = {"vocab_size": 96, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    opt = {
        **{k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "intermediate_size")},
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
    }
    return {
        "llama": t.LlamaConfig(**SHAPE),
        "llama-tied": t.LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True),
        "mistral": t.MistralConfig(**gqa, sliding_window=32),
        "qwen2": t.Qwen2Config(**SHAPE),
        "qwen3": t.Qwen3Config(**gqa),
        "gemma": t.GemmaConfig(**gqa),
        "gemma2": t.Gemma2Config(**gqa, sliding_window=32),
        "phi": t.PhiConfig(**mha),
        "gpt2": t.GPT2Config(**gpt2),
        "opt": t.OPTConfig(**opt),
        "gpt_neox": t.GPTNeoXConfig(**{k: v for k, v in mha.items() if k != "num_key_value_heads"}),
    }


def mixtures() -> dict[str, Any]:
    """Mixtures of experts: architecture name -> a tiny config of it, with four experts of which a token takes two."""
    import transformers as t

    local = {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}
    plain = {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2}
    routed = {**SHAPE, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    shared = {**routed, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    groups = {"n_group": 1, "topk_group": 1}
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
    deepseek = {**shared, **groups, **latent, "num_key_value_heads": 4}
    return {
        "qwen2_moe": t.Qwen2MoeConfig(**routed, num_experts=4, shared_expert_intermediate_size=64),
        "qwen3_moe": t.Qwen3MoeConfig(**routed, num_experts=4, head_dim=16),
        "mixtral": t.MixtralConfig(**local),
        "olmoe": t.OlmoeConfig(**plain),
        "phimoe": t.PhimoeConfig(**local),
        "deepseek_v2": t.DeepseekV2Config(**deepseek),
        "deepseek_v3": t.DeepseekV3Config(**deepseek),
        "glm4_moe": t.Glm4MoeConfig(**shared, **groups, head_dim=16),
        "granitemoe": t.GraniteMoeConfig(**local),
    }


def refused_mixtures() -> dict[str, Any]:
    """Mixtures whose experts no reader takes one by one."""
    import transformers as t

    sizes = {**SHAPE, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1}
    return {"gpt_oss": t.GptOssConfig(**sizes), "llama4": t.Llama4TextConfig(**sizes, intermediate_size_mlp=64)}


def save(folder: Path, config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """A random model of `config`, saved as an ordinary checkpoint; weights spread enough that damage shows."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 3):
                noise = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
                parameter.copy_(noise)
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(folder, **kwargs)
    return folder


def save_tokenizer(folder: Path, vocab_size: int = 96) -> None:
    """A word tokenizer for `words`, with bos, eos and unk."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def save_qwen2_tokenizer(folder: Path) -> None:
    """The same words for a qwen2 checkpoint, whose files transformers reads as Qwen2Tokenizer whatever they declare."""
    from transformers import Qwen2Tokenizer

    pieces = ["<unk>", "w", *"0123456789", "\u0120", "\u0120w"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    Qwen2Tokenizer(vocab=vocab, merges=[("\u0120", "w")]).save_pretrained(folder)


def words(count: int, seed: int = 0, vocab_size: int = 96) -> str:
    """Text of `count` words that `save_tokenizer`'s tokenizer knows, one document."""
    ids = torch.randint(3, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def save_encoder(folder: Path, auto: str, layers: int = 4, seed: int = 0, **changes: Any) -> Path:
    """A tiny BERT with the tokenizer that masking needs."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 96} | changes
    config = transformers.BertConfig(num_hidden_layers=layers, pad_token_id=0, **shape)
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(5, 96))])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(
        folder
    )
    return folder
