"""Scope `representation`: gradients on the tensor through which the tasks reach the trunk.

    g_t   =  dL_t / dz                          z: representation, of any shape; its rows are other instances at every
    G_st  <- beta G_st + (1 - beta) <g_s, g_t>  step, so that gradients must not be averaged, but their products may be
    Ghat  =  G_st / (1 - beta^k_st)             k_st: statistics steps with both tasks

T short passes from the losses down to z, then ONE backward pass of `sum_t w_t L_t + penalty`: the trunk is traversed
once, what lies between z and the losses T + 1 times. An object that knows a shorter way (`Representation`, such as
`UMDAOutput.instances`) may stand for z. With labels missing on some steps the entries of G average over different
steps, and G may be slightly indefinite. Several processes have instances of their own; their Gram matrices are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.sgl import _gradients
from umda_fast.sgl.batch import Batch
from umda_fast.sgl.buffers import accumulation_dtype, as_numbers
from umda_fast.sgl.graph import Look
from umda_fast.sgl.handover import hooks_held
from umda_fast.sgl.scopes.base import GradientScope, Measured, Representation, Setting, reentrant


class RepresentationScope(GradientScope):
    """See the head of this file."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._gram_ema = torch.zeros_like(setting.statistics.gram)
        self._some = False  # whether a gradient came to a representation

    @classmethod
    def missing(cls, representation: Tensor | Representation | None) -> str:
        """A representation that gradients come to."""
        wanted = "representation: expected a Tensor that requires grad, got"
        if representation is None:
            return f"{wanted} None"
        if not isinstance(representation, Tensor) and not hasattr(representation, "gradient_gram"):
            got = type(representation).__name__
            return f"{wanted} {got} (of several tensors, their concatenation, or what they are made of)"
        return "" if representation.requires_grad else f"{wanted} a constant"

    def measure(self, batch: Batch, look: Look, representation: Tensor | Representation | None) -> Measured:
        """Gram matrix of this batch, averaged into the running one."""
        setting, statistics = self._setting, self._setting.statistics
        part = self._part(batch, representation)
        losses, gram = setting.exchange.totals(batch.values(setting.layout.dtype), part)
        batch.unscale_(gram, 2)
        sound = statistics.judge(losses, gram.diagonal(), batch.present)
        statistics.counts += sound
        pairs = sound[:, None] & sound[None, :]
        statistics.average(self._gram_ema, gram, pairs)
        correction = _gradients.bias_correction(statistics.pair_counts + pairs, statistics.beta, gram.dtype)
        return Measured(self._gram_ema * correction, losses, sound)

    def _part(self, batch: Batch, representation: Tensor | Representation | None) -> Tensor:
        """Gram matrix [T, T] of the gradients on this process's instances, zeros where it has none."""
        own = batch.own
        if not own:
            return torch.zeros_like(self._gram_ema)
        assert representation is not None
        here = self._setting.exchange.sets(tuple(batch.present.rows[position] for position, _ in own))
        gram = self._gram([batch.scaled(loss) for _, loss in own], representation)
        if here.everyone:
            return gram
        full = torch.zeros_like(self._gram_ema)
        wide = torch.zeros_like(full[here.index]).index_copy(1, here.index, gram)
        return full.index_copy(0, here.index, wide)

    def _gram(self, losses: Sequence[Tensor], representation: Tensor | Representation) -> Tensor:
        """Gram matrix [A, A] of the gradients of A losses on the representation."""
        dtype, backend = self._setting.layout.dtype, self._setting.backend
        if not isinstance(representation, Tensor):
            return representation.gradient_gram(losses, backend=backend).to(dtype)
        found: list[Tensor | None] = []
        # What is kept of the passes by `retain_grad` is to be the last one's, and a leaf's hooks see that one only.
        retained = representation.grad if representation.retains_grad else None
        try:
            with hooks_held([representation] if representation.is_leaf else []):
                for loss in losses:
                    found += torch.autograd.grad(loss, representation, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" in str(error):
                raise ValueError(reentrant("between the losses and the representation")) from error
            raise
        if representation.retains_grad:
            representation.grad = retained
        if all(gradient is None for gradient in found) and not self._some:
            raise ValueError(
                "representation: no loss reaches it; expected the tensor of this forward pass through which the tasks "
                "reach the trunk, not a copy of it"
            )
        self._some = True
        gradients = [as_numbers(torch.zeros_like(representation) if g is None else g) for g in found]
        return _gradients.gram(gradients, accumulation_dtype(gradients), backend).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The running Gram matrix [T, T]."""
        return {"gram_ema": self._gram_ema}
