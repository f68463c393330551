"""The whole model: encoders, cross-view attention, graph, pooling, branches, heads (docs/model.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from umda_fast.blocks import block
from umda_fast.model import pretrained
from umda_fast.model._numerics import autocast_off
from umda_fast.model.atsb import ATSB, cohesion_penalty
from umda_fast.model.chunked import CrossViews, in_chunks
from umda_fast.model.config import UMDAConfig
from umda_fast.model.encoders import ViewEncoders
from umda_fast.model.experts import ExpertGates
from umda_fast.model.film import FiLM
from umda_fast.model.fusion import ViewConsistency, ViewFusion, fuse_and_penalize
from umda_fast.model.gmip import GMIP, BagPooling, diversity_penalty
from umda_fast.model.hcva import HCVA, concentration_penalty
from umda_fast.model.linear_path import LinearPath
from umda_fast.model.output import UMDAOutput
from umda_fast.model.view_heads import ViewHeads, ViewLogits, ViewPool
from umda_fast.ops import _validate, smoothness_energy

__all__ = ["UMDA"]

ARCHITECTURE = "umda"


class UMDA(nn.Module):
    """Unified multitask, multiview model on bags of instances (Mahmood et al. 2026, equations of docs/model.md).

    Args:
        config: views, tasks and options.
        encoders: view -> module [n, ...] -> [n, width], instead of the default encoder of that view.

    Raises:
        TypeError, ValueError: an encoder for a view that does not exist, or one that is no module.
    """

    def __init__(self, config: UMDAConfig, encoders: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if not isinstance(config, UMDAConfig):
            raise TypeError(f"config: expected a UMDAConfig, got {type(config).__name__}")
        self.config = config
        width, dropout, tasks = config.width, config.dropout, len(config.tasks)
        self.encoders = ViewEncoders(
            config.views,
            width,
            config.encoder_hidden,
            dropout,
            encoders,
            config.input_dropout,
            config.scale_wide,
            config.bins,
            config.whole_inputs,
        )
        self.hcva = (
            HCVA(width, config.heads, len(config.views), config.layers, config.ffn, dropout, config.layer_scale)
            if config.has_hcva
            else None
        )
        self.consistency = ViewConsistency(width)
        self.fusion = ViewFusion(width)
        self.gmip = (
            GMIP(
                width,
                config.heads,
                config.graph_k,
                config.graph_width,
                config.graph_tau,
                config.graph_layers,
                config.message,
                config.symmetrize,
                config.coords_k,
                dropout,
                config.message_norm == "pre",
                config.message_ffn,
                config.layer_scale,
            )
            if config.graph
            else None
        )
        hidden = max(1, width // 2) if config.pool_hidden is None else config.pool_hidden
        self.pooling = BagPooling(width, tasks, hidden, config.bag_statistics)
        self.film = FiLM(config.metadata, width) if config.metadata else None
        own = config.private_experts if config.branching == "ple" else 0
        self.atsb = ATSB(
            width,
            tasks,
            config.private_rank,
            config.task_embedding,
            config.kappa,
            config.kappa_g,
            config.hierarchy,
            config.private,
            None if config.branching == "dual" else ExpertGates(width, tasks, config.experts, own),
            2 * width if config.bag_statistics else 0,
        )
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(width, task.outputs) for task in config.tasks)
        self.linear = LinearPath(config.views, config.tasks) if config.linear_path else None
        views = len(config.views)
        self.view_heads = ViewHeads(views, config.tasks, width, hidden, dropout) if config.view_heads else None

    def forward(
        self,
        views: Mapping[str, Tensor],
        ptr: Tensor,
        mask: Tensor | None = None,
        coords: Tensor | None = None,
        *,
        metadata: Tensor | None = None,
        task_cosines: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> UMDAOutput:
        """Predict for B bags of N instances.

        Args:
            views: view -> features [N, width of the view], floating (what the encoder takes for a view with an
                encoder of its own).
            ptr: int64 [B+1]; bag b owns instances `ptr[b]:ptr[b+1]`; an empty bag is legal.
            mask: bool [N, V], which views an instance has, at least one; None when all. Features of missing
                views are never used (they may be NaN).
            coords: [N, 2], needed with `coords_k` > 0, else not read.
            metadata: floating [B, M], NaN where missing; needed with `config.metadata`, else not read.
            task_cosines: [T, T], cosines of the tasks' gradients for the influence matrix (see `ATSB`).
            frames: int64 [S+1], offsets of S runs of instances, each inside one bag, whose coordinates are of one
                slide: neighbours by coordinates are looked for inside them. None: each bag is one.

        Raises:
            TypeError, ValueError: naming the argument or view, what was expected and what came.
        """
        if mask is not None:
            _validate.views_present(mask, "mask")
        x, view_mass, entropy, alone = in_chunks(self.cross_views, views, ptr, mask, self.config.chunk)
        zero = x.new_zeros((), dtype=view_mass.dtype)
        with block("fusion"):
            fused = fuse_and_penalize(self.fusion, self.consistency, x, mask, self.config.delta)
        with block("penalties"):
            concentration = zero if entropy is None else concentration_penalty(entropy, mask)
        penalties = {
            "entropy": concentration,
            "consistency": fused.consistency,
            "dispersion": fused.dispersion,
        }
        z, view_weights = fused.z, fused.beta
        out = self.pool(z, ptr, coords, view_mass, view_weights, penalties, metadata, task_cosines, frames)
        if self.linear is not None:
            out = self.with_linear(out, self.linear.scores(self.encoders, views, mask), ptr)
        return out if alone is None else self.with_view_heads(out, alone)

    def cross_views(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None = None) -> CrossViews:
        """Encoders and cross-view attention, which see each instance by itself, and for `view_heads` the pools of what
        the encoders gave. Arguments as of `forward`."""
        with block("encoders"):
            x: Tensor = self.encoders(views, mask)
        alone = None
        if self.view_heads is not None:
            with block("view heads"):
                alone = self.view_heads.pool(self.pooling, x, ptr, mask)
        if self.hcva is not None:
            with block("HCVA"):
                y, mass, entropy = self.hcva(x, mask)
            return CrossViews(y, mass, entropy, alone)
        n, count, _ = x.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        view_mass = torch.eye(count, dtype=dtype, device=x.device).expand(n, count, count)
        return CrossViews(x, view_mass if mask is None else view_mass * mask[..., None], None, alone)

    def pool(
        self,
        z: Tensor,
        ptr: Tensor,
        coords: Tensor | None,
        view_mass: Tensor,
        view_weights: Tensor,
        penalties: dict[str, Tensor],
        metadata: Tensor | None = None,
        task_cosines: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> UMDAOutput:
        """All that follows the fusion of views, for z [N, D]; what came before is handed through."""
        zero = z.new_zeros((), dtype=torch.promote_types(z.dtype, torch.float32))
        graph = None
        penalties["smoothness"] = zero
        if self.gmip is not None:
            with block("GMIP"):
                z, graph, weight = self.gmip(z, ptr, coords, frames)
            with block("penalties"):
                penalties["smoothness"] = smoothness_energy(z, graph, weight)
        with block("penalties"):
            penalties["diversity"] = diversity_penalty(z, ptr, self.config.gamma)
        with block("pooling"):
            pooled, attention, attention_entropy, instances, statistics = self.pooling(z, ptr)
        if self.film is not None:
            if metadata is None:
                raise ValueError(f"metadata: expected [{len(pooled)}, {len(self.config.metadata)}], got None")
            pooled = self.film(pooled, metadata)

        # Of the size of the bags: autocast would save no time there, round, and cost a cast for every operand.
        dtype = self.atsb.norm.weight.dtype
        with block("ATSB"), autocast_off(pooled):
            numbers = None if statistics is None else statistics.to(dtype)
            branches, influence = self.atsb(pooled.to(dtype), task_cosines, numbers)
        with block("penalties"):
            penalties["divergence"] = self.atsb.divergence()
            penalties["cohesion"] = cohesion_penalty(branches, influence, ptr.diff() > 0) if self.atsb.private else zero
            penalties["linear"] = zero if self.linear is None else self.linear.penalty()
        with block("heads"), autocast_off(branches):
            heads = zip(self.config.tasks, self.heads, self.dropout(branches).unbind(1), strict=True)
            logits = {task.name: head(branch) for task, head, branch in heads}
        return UMDAOutput(
            logits=logits,
            penalties=penalties,
            attention=attention,
            attention_entropy=attention_entropy,
            view_mass=view_mass,
            view_weights=view_weights,
            influence=influence,
            representation=z,
            instances=instances,
            view_consistency=1.0 - penalties["consistency"],
            branches=branches,
            graph=graph,
        )

    def with_linear(self, out: UMDAOutput, scores: Tensor, ptr: Tensor) -> UMDAOutput:
        """`out` with the logits of the linear path, from `scores` of all instances, added to its own."""
        assert self.linear is not None
        wide = self.linear.pool(scores, ptr)
        return replace(out, logits={name: logits + wide[name] for name, logits in out.logits.items()})

    def with_view_heads(self, out: UMDAOutput, pool: ViewPool) -> UMDAOutput:
        """`out` with what every view alone says, from its pools, added to the logits."""
        assert self.view_heads is not None
        with block("view heads"):
            alone: ViewLogits = self.view_heads(pool, out.branches)
        logits = {name: logits + alone.total[name] for name, logits in out.logits.items()}
        return replace(
            out, logits=logits, view_logits=alone.views, view_present=alone.present, view_features=alone.features
        )

    def shared_parameters(self) -> list[nn.Parameter]:
        """What all tasks train: encoders, cross-view attention, fusion, graph, the hidden units of the pooling,
        conditioning on metadata, the shared path S of the branches and the shared experts."""
        blocks = (self.encoders, self.hcva, self.consistency, self.fusion, self.gmip)
        experts = None if self.atsb.experts is None else self.atsb.experts.shared
        paths = (self.atsb.shared, self.atsb.shared_statistics, experts)
        parts = (*blocks, self.pooling.value, self.pooling.gate, self.film, *paths)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def task_parameters(self) -> list[nn.Parameter]:
        """All other parameters: scores of the pooling, private paths, influence, norms, heads, linear paths and heads
        of single views of the tasks."""
        shared = {id(parameter) for parameter in self.shared_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in shared]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The shared path S [D, D], and that of the statistics: the last parameters that the losses of all tasks pass
        through."""
        parts = (self.atsb.shared, self.atsb.shared_statistics)
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json into `directory`; needs the package safetensors."""
        custom = {"custom_encoders": list(self.encoders.custom)}
        pretrained.save(self, directory, ARCHITECTURE, {**custom, **self.config.to_dict()})

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], encoders: Mapping[str, nn.Module] | None = None
    ) -> UMDA:
        """The model that `save_pretrained` wrote, on the CPU, in the dtype it had.

        Args:
            directory: with model.safetensors and config.json.
            encoders: modules for exactly the views that had encoders of their own; their weights are read back.

        Raises:
            OSError: a file is missing. ValueError: config.json is of another architecture, or `encoders` are
            not those it asks for. RuntimeError: the weights do not fit.
        """
        values = pretrained.read_options(directory, ARCHITECTURE)
        custom, given = values.pop("custom_encoders", []), list(encoders or {})
        if set(custom) != set(given):
            raise ValueError(
                "encoders: expected modules for the views saved with encoders of their own "
                f"({', '.join(custom) or 'none'}), got {', '.join(given) or 'none'}"
            )
        return pretrained.load_weights(cls(UMDAConfig.from_dict(values), encoders), directory)
