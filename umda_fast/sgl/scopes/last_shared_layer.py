"""Scope `last_shared_layer`: gradients on the parameters of one layer.

    g_t   =   dL_t / d(layer)                      averaged, see `averaged`
    .grad +=  d(sum_t w_t L_t + penalty)

T short backward passes, from the losses down to that layer, then ONE of the weighted total for every parameter: the
update is made of this step's gradients, only the weights are smoothed. Over several processes each has columns of its
own of the rows, and the Gram matrices of the columns are added up.
"""

from __future__ import annotations

from torch import Tensor

from umda_fast.sgl.batch import Batch
from umda_fast.sgl.graph import Look
from umda_fast.sgl.parameters import ParameterLists
from umda_fast.sgl.scopes.averaged import AveragedScope
from umda_fast.sgl.scopes.base import Measured, Representation


class LastSharedLayerScope(AveragedScope):
    """See the head of this file."""

    needs_layer = True

    @classmethod
    def parameters(cls, lists: ParameterLists) -> list[Tensor]:
        """The layer's."""
        return lists.layer

    def measure(self, batch: Batch, look: Look, representation: Tensor | Representation | None) -> Measured:
        """Gram matrix of the averages."""
        setting = self._setting
        self.check(batch)
        found = self.fill(batch, look, (), keep_graph=True)
        self.reached = [old or new for old, new in zip(self.reached, found.reached, strict=True)]
        self.rows.wait()
        losses, squares = setting.exchange.totals(batch.values(setting.layout.dtype), self.squares(batch))
        sound = setting.statistics.judge(losses, squares, batch.present)
        return Measured(self.smoothed_gram(sound), losses, sound)
