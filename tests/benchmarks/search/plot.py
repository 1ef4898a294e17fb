"""Score against calls as a picture: one column per task, validation above and test below.

Needs matplotlib (in the `dev` extra); without it nothing is drawn and the report says so. Colours follow the method, in
a fixed order that colour-blind readers can tell apart; rivals are dashed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.cells import COPA, METHODS, RIVALS
from search.figures import Mean, Results, curve_at, test_score

_COLOURS = dict(
    zip(
        METHODS,
        ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#6b6b6b", "#a6a6a6", "#e69f00", "#56b4e9", "#882255", "#999933"),
        strict=True,
    )
)


def draw(results: Results, path: Path) -> Path | None:
    """Draw the curves of the most complete budget's runs, and the test scores of all budgets; the path, or None."""
    if (pyplot := _pyplot()) is None:
        return None
    budget = max(results.budgets, key=lambda b: (sum(bool(results.of(m, b)) for m in METHODS), b))
    steps = np.arange(0, budget + 1, max(1, budget // 200))
    figure, axes = pyplot.subplots(
        2, len(results.tasks), figsize=(4.2 * len(results.tasks), 7.4), squeeze=False, sharey=True, layout="constrained"
    )
    for column, task in enumerate(results.tasks):
        above, below = axes[0][column], axes[1][column]
        for method in results.methods:
            style = {"color": _COLOURS.get(method, "#333333"), "label": method, "linewidth": 1.6}
            style["linestyle"] = "--" if method in RIVALS else "-" if method in COPA else ":"
            runs = results.of(method, budget, task=task)
            if runs:
                curves = np.array([curve_at(run, steps) for run in runs])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # no incumbent yet in any run
                    above.plot(steps, np.nanmean(curves, axis=0), **style)
            budgets = [b for b in results.budgets if results.of(method, b, task=task)]
            means = [np.mean([test_score(r) for r in results.of(method, b, task=task)]) for b in budgets]
            below.plot(budgets, means, marker="o", markersize=4, **style)
        above.set_title(f"{task} ({len({s for t, s in results.pairs if t == task})} seeds)")
        above.set_xlabel(f"distinct calls (runs of {budget})")
        below.set_xlabel("budget, distinct calls")
        below.set_xscale("log", base=2)
        below.set_xticks(results.budgets, [str(b) for b in results.budgets])
        for axis in (above, below):
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("incumbent's validation score")
    axes[1][0].set_ylabel("mean test score of the result")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
    return path


def draw_regret(curves: Mapping[str, Mapping[str, Sequence[Mean]]], budgets: Sequence[int], path: Path) -> Path | None:
    """Regret against calls, one column per recording, bands of 95 %; the path, or None.

    Args:
        curves: Recording -> method -> regret at every budget.
        budgets: Calls.
        path: The picture.
    """
    if (pyplot := _pyplot()) is None:
        return None
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(max(8.0, 5.2 * len(curves)), 5.0), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (task, by_method) in zip(axes[0], curves.items(), strict=True):
        for place, (method, means) in enumerate(by_method.items()):
            colour, own = list(_COLOURS.values())[place % len(_COLOURS)], place == 0
            axis.plot(budgets, [one.value for one in means], color=colour, label=method, linewidth=2.4 if own else 1.4)
            if own and all(one.low is not None for one in means):
                low, high = [one.low for one in means], [one.high for one in means]
                axis.fill_between(budgets, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(task)
        axis.set_xlabel("rows asked")
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, [str(one) for one in budgets])
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("regret, of all right")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed (it is in the dev extra): no picture")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
