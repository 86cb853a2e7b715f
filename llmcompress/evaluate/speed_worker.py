"""`python -m llmcompress.evaluate.speed_worker`: one model, timed on request.

stdin   load [DTYPE] | round | memory          stdout   a line of JSON for each
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmcompress.errors import LLMCompressError, third_party
from llmcompress.evaluate import engines
from llmcompress.evaluate.speed import PREFIX
from llmcompress.models.vocabulary import num_embeddings
from llmcompress.report.environment import peak_memory_bytes, resident_memory_bytes
from llmcompress.seed import derive


class Timed:
    """The model of one folder and the prompt that it is timed on."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._model: Any = None
        self._prompt_1S = torch.empty(0)

    def load(self, dtype: str = "") -> dict[str, Any]:
        """Load, in a dtype where one is named, and compute one token, so that whatever is done on first use is done."""
        before = resident_memory_bytes()
        began = time.perf_counter()
        loaded = engines.load(
            Path(self._request["folder"]), self._request["engine"], self._request["trust_remote_code"],
            getattr(torch, dtype) if dtype else None,
        )  # fmt: skip
        self._model = loaded.model
        vocabulary = num_embeddings(self._model)
        generator = torch.Generator().manual_seed(derive(0, "speed"))
        shape = (1, self._request["prompt_tokens"])
        self._prompt_1S = torch.randint(vocabulary, shape, generator=generator).to(self._model.device)
        self._forward(self._prompt_1S[:, :1], None)
        return {
            "engine": loaded.engine,
            "engine_note": loaded.note,
            "kernels": loaded.kernels,
            "device": loaded.device,
            "dtype": loaded.dtype,
            "stored_dtype": loaded.stored_dtype,
            "load_s": self._since(began),
            "memory_before_load_bytes": before,
        }

    def round(self) -> dict[str, Any]:
        """Read the prompt once and write after it, greedily."""
        began = time.perf_counter()
        out = self._forward(self._prompt_1S, None)
        prefill_s = self._since(began)
        began = time.perf_counter()
        for _ in range(self._request["new_tokens"]):
            out = self._forward(out.logits[:, -1:].argmax(-1), out.past_key_values)
        decode_s = self._since(began)
        return {
            "prefill_tokens_per_s": self._prompt_1S.shape[1] / prefill_s,
            "decode_tokens_per_s": self._request["new_tokens"] / decode_s,
        }

    def memory(self) -> dict[str, Any]:
        """The highest memory so far, of the GPU's allocator where the model is on one."""
        on_gpu = self._model.device.type == "cuda"
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()}

    def _forward(self, tokens_1S: torch.Tensor, past: Any) -> Any:
        with torch.inference_mode():
            return self._model(input_ids=tokens_1S, past_key_values=past, use_cache=True)

    def _since(self, began: float) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> None:
    """Respond to each line of stdin until it ends."""
    timed = Timed(json.loads(sys.argv[1]))
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "load": timed.load,
        "round": timed.round,
        "memory": timed.memory,
    }
    for line in sys.stdin:
        command, *arguments = line.split()
        try:
            with third_party(f"{command} fails"):
                response = commands[command](*arguments)
        except LLMCompressError as error:
            response = {"error": error.message}
        sys.stdout.write(f"{PREFIX}{json.dumps(response)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
