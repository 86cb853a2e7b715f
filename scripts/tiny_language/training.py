"""Training of the bundled checkpoint: a byte-level BPE tokenizer and a Llama of about a million parameters.

Rows of training are documents laid end to end and cut at a fixed length. In most rows each document stands between
`<s>` and `</s>`, as a chat or generation run sees it; in the others documents follow one another after an empty line
with no special token at all, as a plain text file does, so the model is at home in either reading. The learning rate
warms up, stays and falls off (a trapezoid), the weights are averaged nowhere and nothing is tuned on evaluation items.

The data are the same bytes on every machine. The weights repeat on one machine with one torch version; another
machine's sums round differently and give a model that is as good but not the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_language.documents import CHAT_TEMPLATE, conversation, documents, render_chat
from tiny_language.world import Dice

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 1024
ROW_LENGTH = 256
BATCH_SIZE = 6
MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 4e-3
TRAINING_CHARACTERS = 14_000_000
CHAT_SHARE = 0.12
PLAIN_ROW_SHARE = 0.3
TRAINING_SEED = 11


def training_documents(num_characters: int = TRAINING_CHARACTERS) -> list[str]:
    """Plain documents and rendered conversations of the trained side, mixed in a fixed order."""
    plain, dice = documents(TRAINING_SEED, num_characters, held_out=False), Dice(TRAINING_SEED + 1)
    mixed: list[str] = []
    for text in plain:
        mixed.append(text)
        if dice.chance(CHAT_SHARE):
            mixed.append(render_chat(conversation(dice)))
    return mixed


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1024 tokens with bos, eos, pad and the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def pack_rows(texts: list[str], tokenizer: PreTrainedTokenizerFast, dice: Dice) -> torch.Tensor:
    """Documents laid end to end into rows of `ROW_LENGTH` + 1 token ids; each row starts with a new document."""
    import torch

    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    empty_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    bos, eos, wanted = tokenizer.bos_token_id, tokenizer.eos_token_id, ROW_LENGTH + 1
    rows: list[list[int]] = []
    row, plain = list[int](), False
    for ids in encoded:
        row += [*ids, *empty_line] if plain else [bos, *ids, eos]
        if len(row) >= wanted:
            rows.append(row[:wanted])
            row, plain = [], dice.chance(PLAIN_ROW_SHARE)
    return torch.tensor(rows)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised Llama for this tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(TRAINING_SEED)
    chat_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, chat_end]
    return model


def train(model: LlamaForCausalLM, rows: torch.Tensor, num_steps: int) -> float:
    """Train in place for `num_steps` batches (Muon for matrices, AdamW for the rest); gives the last mean loss."""
    import torch

    generator = torch.Generator().manual_seed(TRAINING_SEED)
    optimizers = _optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _trapezoid(step, num_steps)) for o in optimizers]
    losses: list[float] = []
    order, started = torch.empty(0, dtype=torch.long), time.monotonic()
    for step in range(num_steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(rows), generator=generator)
        batch, order = rows[order[:BATCH_SIZE]], order[BATCH_SIZE:]
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedulers):
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            elapsed_s = time.monotonic() - started
            print(f"step {step + 1}/{num_steps}  loss {sum(losses[-50:]) / 50:.4f}  {elapsed_s:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    import torch

    from tiny_language.muon import Muon

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        Muon(matrices, lr=MUON_LEARNING_RATE, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _trapezoid(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / 60, (num_steps - step) / (0.5 * num_steps))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint: bf16 safetensors, config, generation config, tokenizer and chat template."""
    import torch

    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        if name == "tokenizer_config.json":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / name).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
