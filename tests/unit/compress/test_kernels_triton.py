"""The GPU kernel against the compiled loop of the processor. On a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from llmcompress.compress.grid import plain_scales
from llmcompress.compress.scheme import PRESETS, Scheme
from llmcompress.compress.solvers import codes
from llmcompress.compress.solvers.codes import kernel_inputs
from tests.grids import accumulate, weights_only

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("scheme", [weights_only(4, 32), weights_only(3, 16, symmetric=False), PRESETS["NF4"]])
@pytest.mark.parametrize(("rows", "width"), [(40, 128), (64, 64), (7, 96), (33, 24)])
def test_the_gpu_chooses_the_codes_of_the_processor(scheme: Scheme, rows: int, width: int) -> None:
    triton = pytest.importorskip("llmcompress.compress.solvers.kernels_triton")
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 128, generator=generator)
    factor = torch.randn(width, width, generator=generator).triu() * 0.1 + torch.eye(width)
    scale, zero, table = kernel_inputs(plain_scales(weight, scheme.grid, torch.float32), scheme.grid, weight)
    group = torch.arange(width) // scheme.grid.group_width(128)
    columns = weight.t()[:width].contiguous()
    inputs = (factor, scale.t().contiguous(), zero.t().contiguous(), group, table)
    here, there = columns.clone(), columns.to(DEVICE)
    expected = codes.solve_block(here, *inputs, scheme.grid.num_codes - 1)
    found = triton.solve_block(there, *(each.to(DEVICE) for each in inputs), scheme.grid.num_codes - 1)
    assert (found.cpu() == expected).double().mean() > 0.995
    same = found.cpu() == expected
    torch.testing.assert_close(there.cpu()[same], here[same])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_hessian_from_bfloat16_is_that_of_float32() -> None:
    x = torch.randn(4096, 512, device="cuda").to(torch.bfloat16)
    found, count = accumulate([x], [None])
    expected = x.double().t() @ x.double() / len(x)
    assert count == 4096 and found.dtype == torch.float32
    assert float((found.double() - expected).abs().max() / expected.abs().max()) <= 1e-5
