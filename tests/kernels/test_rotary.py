"""Rotary embedding against complex multiplication in fp64, and its gradient against the rotation back."""

from __future__ import annotations

import pytest
import torch
from oreal_kernels.rotary import rotary


def case(rows: int = 5, heads: int = 7, width: int = 16, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(rows + heads + width)
    x = torch.randn(rows, heads, width, generator=generator).to(dtype)
    angles = torch.rand(rows, width // 2, generator=generator, dtype=torch.float64) * 20_000
    return x, angles, torch.cat([angles.cos(), angles.sin()], -1).float()


def exact(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Each pair of a head's halves as a complex number, times exp(i angle)."""
    low, high = x.double().chunk(2, -1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize(
    ("rows", "heads", "width"), [(5, 7, 16), (1, 1, 2), (3, 2, 80), (0, 4, 8), (4, 1, 6), (2, 65, 4), (3, 0, 8)]
)
def test_halves_turn_like_complex_numbers(rows, heads, width, served_by):
    x, angles, cos_sin = case(rows, heads, width)
    torch.testing.assert_close(rotary(x, cos_sin).double(), exact(x, angles), rtol=1e-6, atol=1e-6)


def test_results_in_16_bits_are_rounded_once(served_by):
    dtype = torch.float16 if served_by == "triton" else torch.bfloat16  # Triton's interpreter reads bf16 wrongly
    x, angles, cos_sin = case(40, 4, 32, dtype)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(rotary(x, cos_sin).double(), exact(x, angles), rtol=rounding * 1.01, atol=1e-6)


def test_the_gradient_is_the_rotation_back(served_by):
    x, angles, cos_sin = case()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    leaf = x.requires_grad_()
    rotary(leaf, cos_sin).backward(gradient)
    torch.testing.assert_close(leaf.grad.double(), exact(gradient, -angles), rtol=1e-6, atol=1e-6)


def test_a_view_of_a_wider_tensor_is_read_in_its_place(served_by):
    """Queries are a slice of the fused projection, whose heads lie apart; gradients arrive in any layout."""
    wide, angles, cos_sin = case(6, 9, 48)
    view, angles, cos_sin = wide[:, 2:7, 16:32], angles[:, :8], torch.cat([cos_sin[:, :8], cos_sin[:, 24:32]], 1)
    torch.testing.assert_close(rotary(view, cos_sin).double(), exact(view, angles), rtol=1e-6, atol=1e-6)
    columns_apart = wide.reshape(6, 48, 9).transpose(1, 2)[:, :4, :16]
    leaf = torch.zeros(6, 4, 16, requires_grad=True)
    rotary(leaf, cos_sin).backward(columns_apart)
    torch.testing.assert_close(leaf.grad.double(), exact(columns_apart, -angles), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "cos_sin"), [((3, 2, 5), (3, 5)), ((3, 2, 4), (2, 4)), ((3, 4), (3, 4))])
def test_shapes_that_do_not_fit_are_refused(shape, cos_sin):
    with pytest.raises(ValueError, match="expected"):
        rotary(torch.zeros(shape), torch.zeros(cos_sin))
