"""An adapter: what it was trained on, what that gained on held-out rows, and how to put it on its base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from llmcompress.card.markdown import code, fenced, section, table, text
from llmcompress.card.numerals import count, fixed, significant
from llmcompress.card.sections import source_name
from llmcompress.report import ADAPTER, Finetune, RunReport

NAMES = {"lora": "LoRA", "qlora": "QLoRA", "adalora": "AdaLoRA"}
BASES = {
    "full": "in full precision",
    "nf4": "held as NF4, quantized while it was loaded",
    "stored nf4": "held as the NF4 codes of its checkpoint",
}
FIGURE = "llmcompress/figures/training.png"
"""Loss over the steps, and AdaLoRA's ranks; drawn by figures.py for every report with a curve."""


class Adapter:
    """A folder that PEFT loads."""

    name = "adapter"
    rank = 1
    relation: Literal["adapter", "merge", "quantized", "finetune"] = "adapter"
    library = "peft"

    def owns(self, report: RunReport) -> bool:
        """Whether the output is an adapter's folder."""
        return report.output is not None and report.output.format == ADAPTER

    def sentence(self, report: RunReport) -> str:
        """Kind, rank and base."""
        part = report.finetune
        if part is None:
            return f"An adapter for {source_name(report.source)}."
        return (
            f"Adapter ({NAMES[part.adapter]}) of rank {significant(part.average_rank(), 3)} for "
            f"{source_name(report.source)}, trained on {code(part.data.source)} with the base "
            f"{BASES[part.base_weights]}."
        )

    def facts(self, report: RunReport) -> Sequence[tuple[str, str]]:
        """What training gained."""
        part = report.finetune
        if part is None or part.heldout_loss is None or part.heldout_loss_base is None:
            return ()
        return [("trained", f"held-out loss {fixed(part.heldout_loss_base, 4)} to {fixed(part.heldout_loss, 4)}")]

    def sections(self, report: RunReport) -> Sequence[str]:
        """How it was trained; how to run it stands where it does on every card (running.py)."""
        return () if report.finetune is None else (_training(report.finetune),)

    def tags(self, report: RunReport) -> Sequence[str]:
        """The kind of adapter."""
        if report.finetune is None:
            return ()
        return [*(["peft"] if self.owns(report) else []), "lora", report.finetune.adapter]


def how_to_use(report: RunReport, model_id: str) -> list[str]:
    """Code that puts the adapter on its base, held as it was in training; `model_id` is the adapter's repository."""
    part = report.finetune
    held = part.base_weights if part else "full"
    base = report.source.hub_id if report.source and report.source.hub_id else "PATH/TO/THE/BASE"
    nf4 = part is not None and held == "nf4"
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' * nf4}",
    ]
    lines.append("")
    if part is not None and nf4:
        lines += [
            "four_bit = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={part.double_quant},',
            f"    llm_int8_skip_modules={json.dumps(['lm_head', *part.kept_full])},",
            ")",
        ]
    how = ", quantization_config=four_bit" * nf4
    lines += [
        f'base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, device_map="auto"{how})',
        f"model = PeftModel.from_pretrained(base, {json.dumps(model_id)})",
    ]
    packages = f"pip install peft transformers accelerate{' bitsandbytes' * (held != 'full')}"
    mind = f"It was trained with the base {BASES[held]}; on other weights of the base it was not tried."
    return [fenced("bash", packages), fenced("python", "\n".join(lines)), mind]


def _training(part: Finetune) -> str:
    ran, data = part.training, part.data
    learned = "what is to be answered" if data.loss_on == "completion" else "all of the text"
    rows = [
        ["data", f"{code(data.source)}, sha256 {code(data.sha256)}"],
        [
            "examples",
            f"{count(data.num_examples)} to train on, {count(data.num_heldout)} held out; of kind {data.kind}",
        ],
        ["tokens", f"{count(data.num_tokens)} an epoch, of which {count(data.num_learned)} are learned ({learned})"],
        ["chat template", "applied" if data.chat_template else "not applied"],
        ["base", BASES[part.base_weights]],
        ["adapter", _shape(part)],
        ["steps", f"{count(ran.steps)} of {ran.effective_batch} rows, {significant(ran.epochs, 3)} epochs"],
        ["learning rate", significant(part.learning_rate, 3)],
    ]
    losses = [
        ["the base, as it was trained on", part.heldout_loss_base],
        ["with the adapter before the first step", part.heldout_loss_start],
        ["with the trained adapter", part.heldout_loss],
    ]
    cells = [[str(name), fixed(float(value), 4)] for name, value in losses if value is not None]
    held = (
        table([f"held-out loss over {count(part.heldout_tokens)} tokens", "nats per token"], cells, right=(1,))
        if cells
        else "Nothing was held out, so what it gained was not measured."
    )
    curve = f"![Training loss over the steps]({FIGURE})" if len(ran.curve) > 1 else ""
    return section("How it was fine-tuned", table(["what", "value"], rows), held, curve, _rejected(part), _kept(part))


def _shape(part: Finetune) -> str:
    kind = NAMES[part.adapter] + (", DoRA" if part.dora else "") + (", rsLoRA" if part.rslora else "")
    rank = f"rank {part.rank}"
    if part.initial_rank is not None:
        ranks = [one.rank for one in part.modules]
        average = significant(part.average_rank(), 3)
        rank = f"average rank {average} ({min(ranks)} to {max(ranks)}) from {part.initial_rank}"
    init = "" if part.init == "default" else f", begun with what quantization lost ({part.init})"
    return f"{kind}, {rank}, alpha {significant(part.alpha)}, on {count(len(part.modules))} linears{init}"


def _rejected(part: Finetune) -> str:
    if not part.data.rejected:
        return ""
    lines = [
        f"- {text(one.reason)}: {count(one.count)} rows, first {text(', '.join(one.places[:3]))}"
        for one in part.data.rejected
    ]
    return "Rows that were not used:\n\n" + "\n".join(lines)


def _kept(part: Finetune) -> str:
    if not part.kept_full:
        return ""
    reasons = sorted(set(part.kept_full.values()))
    said = "; ".join(text(reason) for reason in reasons)
    return f"Of the base, {count(len(part.kept_full))} linears stayed in full precision: {said}."


ENTRY = Adapter()
"""Found by its file."""
