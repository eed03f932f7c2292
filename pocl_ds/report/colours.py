"""Colours of subsets and of runs, for light and dark. Those of runs are of Okabe and Ito, safe for
colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LIGHT = ("#2bb3a3", "#2f7fc1", "#4a3aa0", "#24104f")
DARK = ("#b8f5e0", "#63c4ee", "#6f8df0", "#9a63e0")
RUNS_LIGHT = (
    "#0072b2",
    "#c4520a",
    "#00795a",
    "#a8437f",
    "#6b5b00",
    "#3f7fa8",
    "#7a4a00",
    "#444444",
)
RUNS_DARK = ("#56b4e9", "#f0983c", "#35c79c", "#e08dbd", "#e6d94a", "#9ecdf0", "#d9a35c", "#bbbbbb")


def ramp(anchors: Sequence[str], count: int) -> list[str]:
    """`count` colours along a ramp of #rrggbb anchors, dark or light growing with difficulty."""
    points = np.array(
        [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors], float
    )
    places = np.linspace(0, len(anchors) - 1, count) if count > 1 else np.array([1.0])
    channels = [
        np.interp(places, np.arange(len(anchors)), points[:, channel]).round().astype(int)
        for channel in range(3)
    ]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in zip(*channels, strict=True)]


def variables(subsets: int) -> str:
    """CSS: --s0, --s1, … of the subsets and --r0, … of the runs. Paper is light."""
    light = _declared(ramp(LIGHT, subsets), RUNS_LIGHT)
    dark = _declared(ramp(DARK, subsets), RUNS_DARK)
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root:not(.paper){{{dark}}}}}"


def _declared(subsets: Sequence[str], runs: Sequence[str]) -> str:
    named = {
        **{f"s{i}": c for i, c in enumerate(subsets)},
        **{f"r{i}": c for i, c in enumerate(runs)},
    }
    return "".join(f"--{name}:{colour};" for name, colour in named.items())
