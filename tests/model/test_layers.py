"""Attention as the block computes it; the block as a whole: test_dit.py."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative

from svdit.model.layers import NORMS, QK_NORMS, RMSNorm, attend


@pytest.mark.parametrize("tokens", [1, 16, 256])
def test_few_tokens_in_bfloat16_are_plain_products_as_precise_as_torchs(tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 72, generator=g).bfloat16() for _ in range(3))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = [relative(f(q, k, v).double(), expected) for f in (attend, F.scaled_dot_product_attention)]
    assert errors[0] < 2 * max(errors[1], 2.0**-8)
    assert errors[0] > 0 or tokens == 1


def test_everything_else_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(a[0].dtype) or own(*a))
    attend(*torch.randn(3, 1, 1, 4, 8).bfloat16())
    assert calls == []
    attend(*torch.randn(3, 1, 1, 4, 8))
    attend(*torch.randn(3, 1, 1, 600, 8).bfloat16())
    assert calls == [torch.float32, torch.bfloat16]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norms_under_autocast_are_rounded_once(dtype: torch.dtype) -> None:
    assert QK_NORMS["rms"] is NORMS["rms"] is RMSNorm
    norm, x = RMSNorm(64), 5 * torch.randn(9, 64).to(dtype)
    torch.nn.init.normal_(norm.weight)
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
    torch.set_warn_always(True)  # and not once in a process
    with torch.autocast("cpu", torch.bfloat16):
        result = norm(x)
    torch.set_warn_always(False)
    assert result.dtype == dtype
    assert 0 < relative(result.double(), expected) < {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
