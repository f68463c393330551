"""Kaplan and Meier's curves of groups of bags, with the numbers at risk below, as clinicians read them."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import CensoredData, logrank

from umda_fast.tasks.kind import Array
from umda_fast.tasks.shown import Followed
from umda_fast.tasks.survival_scores import kaplan_meier

__all__ = ["logrank_p", "plot_followed"]

_COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7")
_TICKS = 6


def logrank_p(shown: Followed, first: int, other: int) -> float:
    """That of the log-rank test of two of the groups (Peto and Peto, 1972); NaN where there is nothing to compare."""
    parts = []
    for number in (first, other):
        time, event = _of(shown, number)
        parts.append(CensoredData(uncensored=time[event == 1], right=time[event == 0]))
    if not all(len(part) for part in parts) or all(part.num_censored() == len(part) for part in parts):
        return float("nan")
    return float(logrank(*parts).pvalue)


def plot_followed(title: str, shown: Followed) -> Figure:
    """The curves, a tick where a bag was censored, and how many are at risk at some times."""
    groups = [number for number in range(len(shown.names)) if bool((shown.group == number).any())]
    figure = Figure(figsize=(6.4, 4.2 + 0.22 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axis, below = figure.subplots(2, 1, sharex=True, height_ratios=[4.2, 0.3 + 0.25 * len(groups)])
    for number in groups:
        time, event = _of(shown, number)
        times, share = kaplan_meier(time, event)
        label, colour = f"{shown.names[number]} risk ({len(time)})", _COLOURS[number % len(_COLOURS)]
        axis.step(
            np.concatenate([[0.0], times]), np.concatenate([[1.0], share]), where="post", color=colour, label=label
        )
        censored = np.unique(time[event == 0])
        axis.plot(censored, share[np.searchsorted(times, censored)], "|", color=colour, markersize=7)
    axis.set(title=title, ylabel="share without the event", ylim=(0, 1.02))
    axis.set_xlim(left=0)
    axis.legend(frameon=False, fontsize=8)
    ticks = [tick for tick in axis.get_xticks() if 0 <= tick <= float(shown.time.max())][
        :: max(len(axis.get_xticks()) // _TICKS, 1)
    ]
    for row, number in enumerate(groups):
        time, _ = _of(shown, number)
        for tick in ticks:
            left = str(int((time >= tick).sum()))
            below.text(tick, row, left, ha="center", va="center", fontsize=8, color=_COLOURS[number % len(_COLOURS)])
    below.set_yticks(range(len(groups)), [shown.names[number] for number in groups])
    below.set(xlabel="time", ylim=(len(groups) - 0.5, -0.5))
    below.set_title("at risk", fontsize=9, loc="left")
    below.tick_params(length=0)
    below.tick_params(axis="y", pad=14)  # beside the number at 0
    for side in ("top", "right", "left"):
        below.spines[side].set_visible(False)
    return figure


def _of(shown: Followed, number: int) -> tuple[Array, Array]:
    rows = (shown.group == number).numpy()
    return shown.time.double().numpy()[rows], shown.event.double().numpy()[rows]
