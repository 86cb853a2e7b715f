"""Every registered method on every grid keeps the same promises."""

from __future__ import annotations

import pytest
import torch

from llmcompress.compress.methods.base import ACCUMULATED, METHODS, HessianSettings, LinearMethod, MethodSettings
from llmcompress.compress.scheme import PRESETS, Scheme, WeightGrid, unserved
from llmcompress.compress.statistics import Statistics
from llmcompress.compress.weight import QuantizedWeight
from tests.grids import weights_only

GRIDS = [*PRESETS.values(), weights_only(4, 32, symmetric=False), weights_only(3, -1), weights_only(2, 24)]


@pytest.fixture(params=METHODS.names())
def method(request: pytest.FixtureRequest) -> LinearMethod:
    return METHODS.get(request.param)


@pytest.fixture(params=GRIDS, ids=lambda scheme: scheme.label())
def scheme(request: pytest.FixtureRequest) -> Scheme:
    return request.param  # type: ignore[no-any-return]


def inputs(width: int = 384) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, width, generator=generator)
    x[:, 7] = 0
    weight = torch.randn(40, width, generator=generator)
    weight[3] = 0
    weight[5, :64] = 1e-12
    return weight, x.t() @ x / 500


def solved(
    method: LinearMethod, weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> QuantizedWeight:
    """What the method makes of it, given the statistics that it asked for."""
    seen = Statistics(hessian) if method.needs else None
    found = method.solve(weight, seen, scheme, dtype, method.settings())
    assert isinstance(found, QuantizedWeight)
    return found


def test_codes_lie_on_the_grid_and_inputs_are_left_alone(method: LinearMethod, scheme: Scheme) -> None:
    weight, hessian = inputs()
    weight_before, hessian_before = weight.clone(), hessian.clone()
    found = solved(method, weight, hessian, scheme, torch.bfloat16)
    assert torch.equal(weight, weight_before) and torch.equal(hessian, hessian_before)
    assert found.codes_OI.dtype == torch.uint8 and found.codes_OI.shape == weight.shape
    assert int(found.codes_OI.max()) < scheme.grid.num_codes
    assert found.scale_OG.shape == (40, scheme.grid.num_groups(384)) and found.scale_OG.dtype == torch.float32
    assert bool(torch.isfinite(found.dequantize()).all())
    assert (found.nested is not None) == scheme.grid.double_quant
    assert float(found.dequantize()[3].abs().max()) < 0.02


def test_same_input_same_bits_whatever_the_threads(method: LinearMethod, scheme: Scheme) -> None:
    import numba

    weight, hessian = inputs()
    first = solved(method, weight, hessian, scheme, torch.float32).digest()
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert solved(method, weight, hessian, scheme, torch.float32).digest() == first
    finally:
        numba.set_num_threads(threads)


def test_rows_are_independent_where_that_is_declared(method: LinearMethod, scheme: Scheme) -> None:
    """Half of the rows solved alone are those rows of the whole: what stacking and cutting over processes rest on."""
    if not method.rows_independent or scheme.grid.double_quant:
        return
    weight, hessian = inputs()
    whole = solved(method, weight, hessian, scheme, torch.float32)
    part = solved(method, weight[10:30].contiguous(), hessian, scheme, torch.float32)
    assert torch.equal(part.codes_OI, whole.codes_OI[10:30]) and torch.equal(part.scale_OG, whole.scale_OG[10:30])


def test_what_a_method_declares_is_known(method: LinearMethod) -> None:
    assert method.needs <= ACCUMULATED, "nobody accumulates it"
    assert method.makes and issubclass(
        method.settings, HessianSettings if "hessian" in method.needs else MethodSettings
    )
    reason = unserved(Scheme(WeightGrid(), rank=4), method.makes, f"method {method.name}") or ""
    assert "rank" in method.makes or ("not rank" in reason and "choose" in reason)
