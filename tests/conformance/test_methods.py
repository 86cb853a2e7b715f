"""Every registered method on every grid keeps the same promises."""

from __future__ import annotations

import pytest
import torch

from llmcompress.compress.methods.base import METHODS, Method
from llmcompress.compress.scheme import PRESETS, WeightScheme

GRIDS = [*PRESETS.values(), WeightScheme(4, 32, symmetric=False), WeightScheme(3, -1), WeightScheme(2, 24)]


@pytest.fixture(params=METHODS.names())
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS.get(request.param)


@pytest.fixture(params=GRIDS, ids=lambda scheme: scheme.label())
def scheme(request: pytest.FixtureRequest) -> WeightScheme:
    return request.param  # type: ignore[no-any-return]


def inputs(width: int = 384) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, width, generator=generator)
    x[:, 7] = 0
    weight = torch.randn(40, width, generator=generator)
    weight[3] = 0
    weight[5, :64] = 1e-12
    return weight, x.t() @ x / 500


def test_codes_lie_on_the_grid_and_inputs_are_left_alone(method: Method, scheme: WeightScheme) -> None:
    weight, hessian = inputs()
    weight_before, hessian_before = weight.clone(), hessian.clone()
    solved = method.solve(weight, hessian, scheme, torch.bfloat16, method.settings())
    assert torch.equal(weight, weight_before) and torch.equal(hessian, hessian_before)
    assert solved.codes_OI.dtype == torch.uint8 and solved.codes_OI.shape == weight.shape
    assert int(solved.codes_OI.max()) < scheme.num_codes
    assert solved.scale_OG.shape == (40, scheme.num_groups(384)) and solved.scale_OG.dtype == torch.float32
    assert bool(torch.isfinite(solved.dequantize()).all())
    assert (solved.nested is not None) == scheme.double_quant
    assert float(solved.dequantize()[3].abs().max()) < 0.02


def test_same_input_same_bits_whatever_the_threads(method: Method, scheme: WeightScheme) -> None:
    import numba

    weight, hessian = inputs()
    first = method.solve(weight, hessian, scheme, torch.float32, method.settings()).digest()
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert method.solve(weight, hessian, scheme, torch.float32, method.settings()).digest() == first
    finally:
        numba.set_num_threads(threads)
