"""Gains on residuals, messages normalised before they are made, and no cross-view attention among one view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.conftest import VIEWS, make_batch, make_config, total_loss
from tests.model.test_gmip import clusters
from umda_fast import UMDA
from umda_fast.model import GMIP, HCVABlock
from umda_fast.model.gmip import GMIPOutput
from umda_fast.ops import cross_view_attention, neighbor_attention, neighbor_sum
from umda_fast.train.optim import parameter_groups

GAINED: dict[str, Any] = {"layer_scale": 0.0, "message_norm": "pre", "message_ffn": 2}


def set_gains(module: torch.nn.Module) -> list[Tensor]:
    """Every gain away from where it began."""
    gains = [p for name, p in module.named_parameters() if name.endswith("gain")]
    with torch.no_grad():
        for gain in gains:
            gain.copy_(torch.randn(gain.shape, generator=torch.Generator().manual_seed(len(gain))))
    return gains


def test_a_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = HCVABlock(16, 2, 3, layer_scale=0.5).double().eval()
    g1, g2 = set_gains(block)
    x, mask = torch.randn(6, 3, 16, dtype=torch.float64), torch.rand(6, 3) < 0.7
    mask[:, 0] = True
    x = x * mask[..., None]
    normed = block.attention_norm(x)
    q, k, v = block.qkv(normed).view(6, 3, 3, 2, 8).unbind(2)
    out = cross_view_attention(q, k, v, block.gate(normed), bias=block.influence_bias, mask=mask)[0]
    y = x + g1 * block.output(out.reshape(6, 3, 16))
    y = y + g2 * block.ffn(block.ffn_norm(y))
    torch.testing.assert_close(block(x, mask)[0], y * mask[..., None], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("message", ["attention", "mean"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_round_of_messages_is_its_formula(message: Any, norm: str) -> None:
    torch.manual_seed(0)
    pre = norm == "pre"
    gmip = GMIP(16, 2, k=3, layers=2, message=message, pre_norm=pre, ffn=2 * pre, layer_scale=1.0).double().eval()
    set_gains(gmip)
    z, ptr = clusters(40).double(), torch.tensor([0, 15, 15, 40])
    out: GMIPOutput = gmip(z, ptr)
    log_weight = out.weight.log()
    for layer in gmip.layers:
        read = layer.input(layer.norm(z) if pre else z)
        if message == "attention":
            m = neighbor_attention(*read.view(40, 3, 2, 8).unbind(1), out.graph, log_weight).reshape(40, 16)
        else:
            total = 1.0 + neighbor_sum(torch.ones(40, 1, dtype=z.dtype), out.graph, out.weight)
            m = (read + neighbor_sum(read, out.graph, out.weight)) / total
        z = z + layer.gain * layer.output(m)
        z = z + layer.ffn_gain * layer.ffn(layer.ffn_norm(z)) if pre else layer.norm(z)
    torch.testing.assert_close(out.z, z, rtol=1e-10, atol=1e-11)


def test_from_zero_they_begin_as_if_they_were_not_there() -> None:
    torch.manual_seed(0)
    model = UMDA(make_config(**GAINED)).eval()
    batch = make_batch()
    x = model.encoders(batch.views, batch.mask)
    z, _ = model.fusion(x, batch.mask)
    out = model(**batch.inputs())
    torch.testing.assert_close(out.representation, z, rtol=1e-5, atol=1e-6)
    total_loss(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    gains = {name: p for name, p in model.named_parameters() if name.endswith("gain")}
    assert len(gains) == 2 * 2 + 2 * 2
    assert all(p.grad.any() for p in gains.values()), "a gain at 0 must be able to leave it"


def test_gains_do_not_decay() -> None:
    model = UMDA(make_config(**GAINED))
    free = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(p) in free for name, p in model.named_parameters() if name.endswith("gain"))


def test_one_view_has_nothing_to_attend_to() -> None:
    torch.manual_seed(0)
    one = UMDA(make_config(views=VIEWS[:1], hcva="auto")).eval()
    assert one.hcva is None
    assert UMDA(make_config(hcva="auto")).hcva is not None
    batch = make_batch(views=VIEWS[:1])
    out = one(**batch.inputs())
    torch.testing.assert_close(out.view_mass, batch.mask[..., None].float())
    assert float(out.penalties["entropy"]) == 0.0
    total_loss(one, batch).backward()


def test_bfloat16_autocast_with_gains() -> None:
    torch.manual_seed(0)
    model, batch = UMDA(make_config(**{**GAINED, "layer_scale": 0.3})), make_batch()
    exact = model.eval()(**batch.inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch.inputs())
        loss = total_loss(model, batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for name, logits in exact.logits.items():
        assert F.mse_loss(out.logits[name].float(), logits).sqrt() < 0.05 * (1 + logits.abs().max())
