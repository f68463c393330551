"""Metrics in people's words."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["METRIC_NAMES", "MetricName", "metric_name"]


@dataclass(frozen=True)
class MetricName:
    """`title`: the usual spelling. `in_label_units`: or else a number that tasks can be compared by."""

    title: str
    lower_is_better: bool = False
    in_label_units: bool = False

    def __str__(self) -> str:
        return f"{self.title} (label units)" if self.in_label_units else self.title


METRIC_NAMES = {
    "auroc": MetricName("AUROC"),
    "accuracy": MetricName("accuracy"),
    "balanced_accuracy": MetricName("balanced accuracy"),
    "f1": MetricName("F1"),
    "auprc": MetricName("AUPRC"),
    "sensitivity_90": MetricName("sensitivity at 90 % specificity"),
    "cohen_kappa": MetricName("Cohen's kappa"),
    "f1_macro": MetricName("macro F1"),
    "f1_micro": MetricName("micro F1"),
    "map": MetricName("mAP"),
    "mae": MetricName("MAE", lower_is_better=True, in_label_units=True),
    "kappa": MetricName("quadratic kappa"),
    "mae_grades": MetricName("MAE in grades", lower_is_better=True),
    "c_index": MetricName("C-index (Harrell)"),
    "c_index_uno": MetricName("C-index (Uno)"),
    "auc_td": MetricName("time-dependent AUC"),
    "ibs": MetricName("integrated Brier score", lower_is_better=True),
    "r2": MetricName("R2"),
}


def metric_name(metric: str) -> MetricName:
    """Of a metric without an entry, its own name; higher is better."""
    return METRIC_NAMES.get(metric, MetricName(metric))
