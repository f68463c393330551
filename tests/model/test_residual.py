"""Gains on residuals, messages normalised before they are made, and no cross-view attention among one view."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.conftest import VIEWS, make_batch, make_config, total_loss
from tests.model.test_gmip import clusters
from umda_fast import UMDA, ops
from umda_fast.model import GMIP, HCVA, HCVABlock
from umda_fast.model.gmip import GMIPOutput
from umda_fast.ops import _library, cross_view_attention, neighbor_attention, neighbor_sum
from umda_fast.parity.rule import assert_close
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


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_hand_on_what_the_next_one_reads(masked: bool) -> None:
    """Each normalised by the pass that made it, they are block after block, values and gradients."""
    torch.manual_seed(0)
    hcva = HCVA(16, 2, 3, layers=3, layer_scale=0.0).double().eval()
    set_gains(hcva)
    mask = torch.arange(27).reshape(9, 3) % 4 > 0 if masked else None
    x = torch.randn(9, 3, 16, dtype=torch.float64)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)
    ours, own = (x.clone().requires_grad_() for _ in range(2))
    y, mass, entropy = hcva(ours, mask)
    alone, expected_mass, entropies = own, torch.empty(0), []
    for block in hcva.blocks:
        alone, expected_mass, one = block(alone, mask)
        entropies.append(one)
    torch.testing.assert_close(y, alone)
    torch.testing.assert_close(mass, expected_mass)
    torch.testing.assert_close(entropy, torch.stack(entropies))
    found = torch.autograd.grad((y.sin().sum() + mass.square().sum() + entropy.sum()), [ours, *hcva.parameters()])
    total = alone.sin().sum() + expected_mass.square().sum() + torch.stack(entropies).sum()
    for a, b in zip(found, torch.autograd.grad(total, [own, *hcva.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ffn", [0, 2])
def test_rounds_hand_on_what_the_next_one_reads(ffn: int) -> None:
    torch.manual_seed(0)
    z, ptr = clusters(60).double(), torch.tensor([0, 25, 25, 60])
    gmip = GMIP(16, 2, k=3, graph_width=8, layers=3, pre_norm=True, ffn=ffn, layer_scale=0.0).double().eval()
    set_gains(gmip)
    out = gmip(z, ptr)
    log_weight = out.weight.log()
    alone = z
    for layer in gmip.layers:
        alone = layer(alone, out.graph, log_weight)
    torch.testing.assert_close(out.z, alone)


def test_blocks_drop_the_same_on_every_backend() -> None:
    """In training: kernels, the reference and float64 draw the same masks from one state of the generator."""
    torch.manual_seed(0)
    hcva = HCVA(16, 2, 3, layers=2, dropout=0.3, layer_scale=0.0).train()
    set_gains(hcva)
    x, weight = torch.randn(40, 3, 16), torch.randn(40, 3, 16)

    def run(hcva: HCVA, backend: str) -> list[Tensor]:
        wide = next(hcva.parameters()).dtype
        leaf = x.to(wide).requires_grad_()
        torch.manual_seed(7)
        with ops.use_backend(backend):
            y = hcva(leaf).y
        return [y.detach(), *torch.autograd.grad((y * weight).sum(), [leaf, *hcva.parameters()])]

    exact, own = run(copy.deepcopy(hcva).double(), "reference"), run(hcva, "reference")
    ours = run(hcva, "auto")
    if _library.cpp_status is None:
        assert ops.backends_used()["dropout_add_norm"] == ops.backends_used()["gelu_dropout"] == "cpp"
    for i, (a, e, c) in enumerate(zip(ours, exact, own, strict=True)):
        assert_close(f"result {i}", a, e, c, 3 if i else 2)
    torch.manual_seed(8)
    assert not torch.equal(hcva(x).y, own[0])
