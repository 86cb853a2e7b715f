"""What commands import, for the server that forks them; nothing is computed here, as threads do not survive a fork."""

import importlib

for name in (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "trl", "lm_eval.evaluator",
    "lm_eval.models.huggingface", "datasets", "matplotlib.pyplot", "accelerate", "safetensors.torch",
    "transformers.trainer", "llmcompress.api.tools", "llmcompress.api.verbs", "llmcompress.pipeline.run",
):  # fmt: skip
    try:
        importlib.import_module(name)
    except ImportError:
        continue

from llmcompress.config.stage import stages  # noqa: E402

stages()
