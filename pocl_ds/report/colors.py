"""Colors of subsets and of runs, in light and dark mode.

Those of runs are based on the palette of Okabe and Ito, which color-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Anchors of the color ramp of subsets, from the easiest to the hardest.
SUBSETS_LIGHT = ("#2bb3a3", "#2f7fc1", "#4a3aa0", "#24104f")
SUBSETS_DARK = ("#b8f5e0", "#63c4ee", "#6f8df0", "#9a63e0")
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


def color_ramp(anchors: Sequence[str], count: int) -> list[str]:
    """`count` colors #rrggbb, evenly spaced along a ramp through the anchors."""
    points = np.array(
        [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors], float
    )
    positions = np.linspace(0, len(anchors) - 1, count) if count > 1 else np.array([1.0])
    channels = [
        np.interp(positions, np.arange(len(anchors)), points[:, channel]).round().astype(int)
        for channel in range(3)
    ]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in zip(*channels, strict=True)]


def css_variables(subsets: int) -> str:
    """CSS variables: --s0, ... for subsets and --r0, ... for runs. Printed pages are light."""
    light = _declarations(color_ramp(SUBSETS_LIGHT, subsets), RUNS_LIGHT)
    dark = _declarations(color_ramp(SUBSETS_DARK, subsets), RUNS_DARK)
    return (
        f":root{{{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not(.paper){{{dark}}}}}"
    )


def _declarations(subsets: Sequence[str], runs: Sequence[str]) -> str:
    variables = {
        **{f"s{i}": color for i, color in enumerate(subsets)},
        **{f"r{i}": color for i, color in enumerate(runs)},
    }
    return "".join(f"--{name}:{color};" for name, color in variables.items())
