"""Reports to draw cards from: one with everything that a run can leave behind, one with nothing but its head."""

from __future__ import annotations

import random
from typing import Any

from llmcompress.evaluate.statistics import mcnemar_p
from llmcompress.report import (
    ADAPTER,
    PLAIN,
    AdapterModule,
    AdapterRetention,
    Calibration,
    Check,
    CurvePoint,
    Distillation,
    DistillScore,
    DistillTeacher,
    EngineVerdict,
    Environment,
    Evaluation,
    Finding,
    Finetune,
    LinearRetention,
    LinearRow,
    Merge,
    MergedAdapter,
    MergedLinear,
    Output,
    RejectedRows,
    RunReport,
    Score,
    Source,
    StageRow,
    TaskResult,
    TextResult,
    Training,
    TrainingData,
)

KINDS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
GRIDS: dict[str, dict[str, int | bool | str | None]] = {
    "int4 g128 sym": {
        "num_bits": 4,
        "group_size": 128,
        "symmetric": True,
        "codebook": None,
        "double_quant": False,
    },
    "nf4 b64": {"num_bits": 4, "group_size": 64, "symmetric": True, "codebook": "nf4", "double_quant": False},
}
SECRET = "/home/somebody/private models/base-model"
IDENTITY = "5f0b922a1e31c4ca4d61689993a9c33814e12cf056053dec27355bce3eb6c188"


def minimal_report(**changes: Any) -> RunReport:
    """Nothing but what every report has."""
    machine = Environment(
        llmcompress="0.1.0", python="3.11.9", libraries={}, platform="Linux x86_64", processor="a CPU", num_threads=1
    )
    return RunReport(created="2026-11-20T10:00:00+00:00", recipe={}, seed=0, environment=machine).model_copy(
        update=changes
    )


def full_report(layout: str = "gptq", seed: int = 0, local: bool = False, num_layers: int = 6) -> RunReport:
    """Everything, with figures drawn from `seed`; `local` takes the source from a folder instead of the Hub."""
    chance = random.Random(seed)
    rows = linear_rows(chance, num_layers, "nf4 b64" if layout == "bitsandbytes" else "int4 g128 sym")
    libraries = {"torch": "2.9.1", "transformers": "5.23.0", "lm-eval": "0.4.13"}
    machine = Environment(
        llmcompress="0.1.0",
        python="3.11.9",
        libraries=libraries,
        platform="Linux x86_64",
        processor="a CPU, 2 cores",
        num_threads=2,
    )
    return RunReport(
        created="2026-11-20T10:00:00+00:00",
        recipe=recipe(layout, local),
        seed=7,
        environment=machine,
        stages=stages(chance),
        source=source(local),
        calibration=calibration(),
        linears=rows,
        output=output(chance, layout, rows),
        checks=[
            Check(name="files", passed=True, detail="sha256 of all 1 weight files equal to the report's"),
            Check(name="round trip", passed=True, detail="all 42 linears equal bit for bit to the solver's"),
        ],
        engines=engines(layout),
        evaluations=[evaluation(chance)],
        notes=["the tokenizer adds no first token"],
    )


def engines(layout: str) -> list[EngineVerdict]:
    """What `check` says of each layout."""
    needs = {
        "gptq": ["optimum", "gptqmodel"],
        "compressed_tensors": ["compressed-tensors"],
        "bitsandbytes": ["bitsandbytes"],
    }
    gone = Finding(rule="layout", level="refuses", detail="no loader any more", source="its source")
    refused = layout == "bitsandbytes"
    return [
        EngineVerdict(engine="transformers", version="5.23.0", loads=True, needs=needs[layout]),
        EngineVerdict(engine="vllm", version="0.33.0", loads=not refused, findings=[gone] if refused else []),
    ]


def recipe(layout: str, local: bool) -> dict[str, Any]:
    """A recipe as `Recipe.dump` gives it."""
    quantize = {"scheme": "W4A16", "method": "gptq", "format": [layout], "calibration": "../texts/stories.txt"}
    return {
        "model": SECRET if local else "some-org/base-model",
        "revision": "refs/pr/1",
        "output": "/home/somebody/results/tiny-w4",
        "seed": 7,
        "stages": [
            {"quantize": quantize},
            {"verify": {"forward": True}},
            {"evaluate": {"suite": "tiny"}},
            {"card": {}},
        ],
    }


def source(local: bool) -> Source:
    """The checkpoint that went in."""
    return Source(
        name=SECRET if local else "some-org/base-model",
        hub_id=None if local else "some-org/base-model",
        revision=None if local else "0123456789abcdef0123456789abcdef01234567",
        identity=IDENTITY,
        architecture="LlamaForCausalLM",
        dtype="bfloat16",
        num_parameters=5_770_496,
        weights_bytes=11_540_992,
        license="Apache-2.0",
        languages=["en", "no"],
        pipeline_tag="text-generation",
    )


def calibration() -> Calibration:
    """The text."""
    return Calibration(
        name="stories",
        source="stories.txt",
        license="CC0-1.0",
        num_samples=64,
        seq_len=256,
        num_tokens=16_384,
        chat_template=False,
        seed=7,
        sha256="613ff3c8999dc17411698c7406355166fe6c157867540934b1648516710dcdbd",
    )


def linear_rows(chance: random.Random, num_layers: int, grid: str) -> list[LinearRow]:
    """One row per linear: the last down_proj fell back, lm_head was left alone."""
    rows = [
        LinearRow(
            name=f"model.layers.{layer}.{kind}",
            shape=shape,
            scheme=grid,
            grid=GRIDS[grid],
            tensor_prefix=f"model.layers.{layer}.{kind}",
            method="gptq",
            outcome="quantized",
            relative_error=0.001 * (1 + index) * chance.lognormvariate(0.15 * layer, 0.2),
            error_kind="output",
            num_tokens=16_384,
            digest="d605b793",
        )
        for layer in range(num_layers)
        for index, (kind, shape) in enumerate(KINDS.items())
    ]
    fell = {"method": "rtn", "outcome": "fell_back", "reason": "its Hessian is singular", "error_kind": "weight"}
    rows[-1] = rows[-1].model_copy(update=fell)
    head = LinearRow(
        name="lm_head",
        shape=(4096, 256),
        scheme=None,
        method=None,
        outcome="skipped",
        reason="outside the decoder layers",
    )
    return [*rows, head]


def output(chance: random.Random, layout: str, rows: list[LinearRow]) -> Output:
    """The checkpoint that came out."""
    quantized = sum(row.shape[0] * row.shape[1] for row in rows if row.outcome != "skipped")
    size = quantized // 2 + 2_000_000 + chance.randrange(100_000)
    return Output(
        format=layout,
        files={"model.safetensors": size + 4096},
        digests={"model.safetensors": "c579588500268c7d"},
        weights_bytes=size,
        bits_per_weight=4.25,
        bits_per_weight_model=8 * size / 5_770_496,
        quantized_parameters=quantized,
        total_parameters=5_770_496,
    )


def stages(chance: random.Random) -> list[StageRow]:
    """What ran."""
    return [
        StageRow(name=name, key="0" * 64, status="done", seconds=chance.uniform(1, 90), peak_memory_bytes=812_345_678)
        for name in ("quantize", "verify", "evaluate", "card")
    ]


def task(name: str, base: float, change: float, half: float, verdict: Any, flips: tuple[int, int]) -> TaskResult:
    """A 0/1 task whose difference is `change`, give or take `half`."""
    return TaskResult(
        task=name,
        metric="acc",
        num_fewshot=0,
        num_items=500,
        baseline=Score(value=base, stderr=0.0123),
        compressed=Score(value=base + change, stderr=0.0131),
        difference=change,
        interval=(change - half, change + half),
        better=flips[0],
        worse=flips[1],
        mcnemar_p=mcnemar_p(*flips),
        budget=0.02,
        verdict=verdict,
        dataset_path="json",
        dataset_split="test",
    )


def evaluation(chance: random.Random) -> Evaluation:
    """One suite with every verdict, a generative task, and a held-out text."""
    free = task("gsm8k", 0.412, -0.0061, 0.021, "inconclusive", (18, 21)).model_copy(
        update={
            "metric": "exact_match,strict-match",
            "num_fewshot": 5,
            "dataset_path": "openai/gsm8k",
            "dataset_name": "main",
            "hub_dataset": True,
        }
    )
    perplexity = 6.1234 + chance.random()
    text = TextResult(
        name="heldout",
        num_tokens=19_968,
        seq_len=256,
        baseline_perplexity=perplexity,
        compressed_perplexity=1.0143 * perplexity,
        perplexity_ratio_interval=(1.008, 1.021),
        kl=0.0134 + 0.01 * chance.random(),
        kl_interval=(0.0121, 0.0251),
        top1_agreement=0.94 + 0.05 * chance.random(),
        budget_kl=0.05,
        budget_perplexity_ratio=1.03,
        verdict="pass",
    )
    return Evaluation(
        suite="tiny",
        baseline=IDENTITY,
        baseline_cached=False,
        engine="transformers 5.23.0",
        engine_note="our dequantized weights: GPTQModel is not installed",
        device="cpu",
        dtype="float32",
        seed=7,
        harness="lm-eval 0.4.13",
        tasks=[
            task("tiny_agreement", 0.97 + 0.01 * chance.random(), -0.004, 0.008, "pass", (1, 3)),
            task("tiny_facts", 0.91 + 0.01 * chance.random(), -0.046, 0.019, "fail", (2, 25)),
            task("tiny_sums", 0.64 + 0.01 * chance.random(), -0.012, 0.022, "inconclusive", (9, 15)),
            free,
        ],
        texts=[text],
        verdict="fail",
        seconds=93.2,
    )


def training_data() -> TrainingData:
    """Rows of a file."""
    return TrainingData(
        source="train.jsonl", sha256="0" * 64, kind="text", chat_template=False, loss_on="all", seq_len=128,
        packing=False, num_examples=10, num_rows=10, num_heldout=2, num_tokens=900, num_loss_tokens=890,
        num_heldout_in_training=0, rejected=[RejectedRows(reason="too long", count=3, locations=["train.jsonl:4"])],
    )  # fmt: skip


def student() -> RunReport:
    """A causal student of one teacher, as plain weights."""
    report = full_report()
    assert report.output is not None
    report.distillation = Distillation(
        kind="causal",
        teachers=[DistillTeacher(name="/home/me/big", identity="1" * 64, num_parameters=4000, share=1.0)],
        combine="probabilities",
        student="cut from big: layers 0, 2 of 4",
        student_parameters=2500,
        losses={"forward_kl": 1.0, "hidden_mse": 0.5},
        temperature=2.0,
        layer_maps=["0:1,1:3"],
        num_heldout=321,
        scores=[
            DistillScore(metric="perplexity", higher_is_better=False, teacher=10.0, before=90.25, after=12.5),
            DistillScore(metric="KL to the teacher", higher_is_better=False, teacher=None, before=2.0, after=0.25),
        ],
        teacher_rows_per_s=100.0,
        student_rows_per_s=180.0,
        data=training_data(),
        training=Training(steps=7, epochs=1, effective_batch=8, trained_parameters=2500, seconds=1.0),
        notes=["teacher and student have 152064 and 151936 rows of logits"],
    )
    report.linears = []
    report.output = report.output.model_copy(update={"format": PLAIN, "quantized_parameters": 0})
    return report


def adapter() -> RunReport:
    """A QLoRA adapter beside its base."""
    report = full_report()
    assert report.output is not None
    curve = [CurvePoint(step=step, loss=2.0 / step, learning_rate=1e-4) for step in (1, 2, 3)]
    report.finetune = Finetune(
        adapter="qlora", base="some-org/base-model", base_identity=IDENTITY, base_weights="nf4", double_quant=True,
        full_precision_linears={"model.layers.0.mlp.down_proj": "its width is no multiple of 64"}, compute_dtype="bfloat16",
        init="default", rank=8, alpha=16.0, dropout=0.0, dora=False, rslora=True,
        modules=[AdapterModule(name="model.layers.0.self_attn.q_proj", shape=(256, 256), rank=8)],
        data=training_data(), data_path="/home/somebody/train.jsonl", learning_rate=2e-4, heldout_tokens=1234,
        training=Training(steps=3, epochs=1, effective_batch=8, trained_parameters=4096, seconds=1.0, curve=curve),
        heldout_loss_base=2.5, heldout_loss_initial=2.5, heldout_loss=1.25,
    )  # fmt: skip
    report.linears, report.calibration, report.engines = [], None, []
    report.checks.append(Check(name="reload", passed=True, detail="loaded by PEFT"))
    report.output = report.output.model_copy(update={"format": ADAPTER, "quantized_parameters": 0})
    return report


def merged(quantized: bool = False) -> RunReport:
    """That adapter merged into its base, and quantized if asked for."""
    report = full_report("compressed_tensors")
    assert report.output is not None
    report.finetune = adapter().finetune
    name = "model.layers.0.self_attn.q_proj"
    report.merge = Merge(
        onto="dequantized",
        adapters=[
            MergedAdapter(
                path="/home/somebody/adapter", weight=1.0, kind="LORA", dora=False, sha256="ab" * 32, base_matches=True
            )
        ],
        linears=[MergedLinear(name=name, rank=8, relative_update=0.02, error_over_rounding=0.5)],
        num_nf4_linears=1,
        heldout_tokens=640,
        kl_dequantized=0.001,
        kl_original=0.004,
        closer="dequantized",
    )
    if quantized:
        rows = [
            LinearRetention(name=name, kept=0.87, kept_rtn=0.61, noise=0.02, size=0.75),
            LinearRetention(name=name.replace("0", "1"), kept=3.16, kept_rtn=-2.17, noise=1.4, size=0.25),
        ]
        report.adapter_retention = AdapterRetention(
            linears=rows, kept=0.87, kept_rtn=0.61, heldout_tokens=640, kl=0.02, kl_rtn=0.05,
            num_rows=40, loss_tokens=600, loss_base=2.5, loss_adapter=2.0, loss_merged=2.01, loss_quantized=2.1,
            gain_kept=0.8, gain_kept_interval=(0.71, 0.88),
        )  # fmt: skip
    else:
        report.linears, report.calibration = [], None
        report.output = report.output.model_copy(update={"format": PLAIN, "quantized_parameters": 0})
    return report
