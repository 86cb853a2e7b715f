"""Training of the bundled checkpoint: a byte-level BPE tokenizer and a Llama of about a million parameters.

The model reads lists, then one document of any kind per row, then documents laid end to end:

    steps   0 ..  12%   <s> list </s> . . .          padded, alone: the way to copy is learnt
    steps  12 ..  75%   <s> document </s> . . .      padded: what it is to copy stands in this very document
    steps  75 .. 100%   <s> a </s> <s> b </s> ...    rows of 256; in some, documents follow after an empty line and no
                                                     special token, as in a plain text file

The order matters. A list said again is learnt by looking back for the word just read; with a dozen other documents in
view that word stands in many places, and the model never finds out (recall stays at chance). Alone, it takes 200 steps,
and the skill is kept when other kinds and other documents join. The learning rate warms up, stays and falls off (a
trapezoid), the weights are averaged nowhere and nothing is tuned on evaluation items.

The data are the same bytes on every machine. The weights repeat on one machine with one torch version; another
machine's sums round differently and give a model that is as good but not the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_language.documents import CHAT_TEMPLATE, conversation, documents, lists, render_chat
from tiny_language.world import Dice

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY_SIZE = 1024
ROW_LENGTH = 256
ROWS_PER_BATCH, DOCUMENTS_PER_BATCH = 8, 32
LISTS_UNTIL, ALONE_UNTIL = 0.12, 0.75
"""Shares of the steps after which other kinds join, and after which documents share a row."""
MUON_LEARNING_RATE = 0.008
ADAM_LEARNING_RATE = 2e-3
TRAINING_CHARACTERS = 12_000_000
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


def training_lists(num_documents: int = 8_000) -> list[str]:
    """Lists alone, for the first steps."""
    dice = Dice(TRAINING_SEED + 3)
    return [lists(dice, held_out=False) for _ in range(num_documents)]


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


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each document between bos and eos, cut at `ROW_LENGTH` + 1."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[bos, *ids, eos][: ROW_LENGTH + 1] for ids in encoded]


def pack_rows(documents: list[list[int]], tokenizer: PreTrainedTokenizerFast, dice: Dice) -> torch.Tensor:
    """Documents laid end to end into rows of `ROW_LENGTH` + 1 token ids; each row starts with a new document."""
    import torch

    empty_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    wanted = ROW_LENGTH + 1
    rows: list[list[int]] = []
    row, plain = list[int](), False
    for ids in documents:
        row += [*ids[1:-1], *empty_line] if plain else ids
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


def train(
    model: LlamaForCausalLM, copying: list[list[int]], documents: list[list[int]], rows: torch.Tensor, num_steps: int
) -> float:
    """Train in place for `num_steps` batches (Muon for matrices, AdamW for the rest); gives the last mean loss.

    copying (lists alone) and documents: token ids of each; rows: int64 [N, `ROW_LENGTH` + 1]. Each serves its own part
    of the steps.
    """
    import torch

    optimizers = _optimizers(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _trapezoid(step, num_steps)) for o in optimizers]
    batches = _batches(copying, documents, rows, num_steps)
    losses: list[float] = []
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        logits = model(batch[:, :-1].clamp(min=0), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedulers):
            stepper.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            elapsed_s = time.monotonic() - started
            print(f"step {step}/{num_steps}  loss {sum(losses[-50:]) / 50:.4f}  {elapsed_s:.0f} s", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def _batches(
    copying: list[list[int]], documents: list[list[int]], rows: torch.Tensor, num_steps: int
) -> Iterator[torch.Tensor]:
    drawn_lists, drawn_documents = (
        _drawn(len(part), DOCUMENTS_PER_BATCH, i) for i, part in enumerate((copying, documents))
    )
    drawn_rows = _drawn(len(rows), ROWS_PER_BATCH, 2)
    for step in range(num_steps):
        if step < LISTS_UNTIL * num_steps:
            yield _padded([copying[i] for i in next(drawn_lists)])
        elif step < ALONE_UNTIL * num_steps:
            yield _padded([documents[i] for i in next(drawn_documents)])
        else:
            yield rows[next(drawn_rows)]


def _drawn(num_items: int, batch_size: int, stream: int) -> Iterator[list[int]]:
    """Batches of indices without end, every item once before any comes again."""
    import torch

    generator = torch.Generator().manual_seed(TRAINING_SEED + stream)
    while True:
        order = torch.randperm(num_items, generator=generator).tolist()
        for start in range(0, num_items - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _padded(documents: list[list[int]]) -> torch.Tensor:
    """One document per row, filled up with -1, which the loss leaves out (and no earlier token can see)."""
    import torch

    width = max(map(len, documents))
    return torch.tensor([ids + [-1] * (width - len(ids)) for ids in documents])


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
