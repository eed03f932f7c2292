"""Charts as inline SVG: lines with stage bands, stacked histograms, scatter. Colours are CSS classes, so that a page
decides them for light and dark.

Coordinates are SVG user units; data keep their own units, which the axis labels name.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WIDTH, WIDE, HEIGHT = 600, 1130, 310
LEFT, RIGHT, TOP, BOTTOM = 72, 14, 24, 48
MAX_POINTS = 600
MAX_DOTS = 1500


@dataclass(frozen=True)
class Line:
    """One series of a line chart. style: CSS class; dots: show every point."""

    name: str
    style: str
    x: Floats
    y: Floats
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A range of the x axis with a name at its top."""

    start: float
    stop: float
    label: str


def downsample(x: Floats, y: Floats, groups: Floats | None = None, limit: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """At most `limit` points: means of neighbouring ones. Values that are not finite are left out.

    groups: a number for every point (its stage); no bucket reaches over a change of it.
    """
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) <= limit:
        return x, y
    changes = [0] if groups is None else [0, *(np.flatnonzero(np.diff(groups[kept])) + 1).tolist()]
    if len(changes) > limit // 2:
        changes = [0]
    edges: list[int] = []
    for start, stop in zip(changes, [*changes[1:], len(x)], strict=True):
        buckets = 1 + (limit - len(changes)) * (stop - start) // len(x)
        edges += (start + np.arange(min(buckets, stop - start)) * (stop - start) // min(buckets, stop - start)).tolist()
    sizes = np.diff([*edges, len(x)])
    return np.add.reduceat(x, edges) / sizes, np.add.reduceat(y, edges) / sizes


def line_chart(
    title: str, lines: Sequence[Line], *, x_label: str, y_label: str, bands: Sequence[Band] = (), from_zero: bool = False,
    width: int = WIDTH,
) -> str:  # fmt: skip
    """Series over a common axis. Bands are shaded in turn. At least one series has a point."""
    xs, ys = np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines])
    ends = [edge for band in bands for edge in (band.start, band.stop)]
    y_range = _range([*ys, 0.0] if from_zero else ys, 0.06, floor=0.0 if from_zero else None)
    frame = _Frame(_range([*xs, *ends], 0.0), y_range, width)
    parts = [_band(frame, band, i) for i, band in enumerate(bands)]
    parts.append(frame.axes(x_label, y_label))
    for line in lines:
        points = [(f"{frame.x(a):.1f}", f"{frame.y(b):.1f}") for a, b in zip(line.x, line.y, strict=True)]
        if len(points) > 1:
            parts.append(f'<path class="line {line.style}" d="M{"L".join(f"{a} {b}" for a, b in points)}"/>')
        if line.dots or len(points) == 1:
            parts.append(f'<path class="dots {line.style}" d="{"".join(f"M{a} {b}h0" for a, b in points)}"/>')
    return _svg(title, parts, width)


def histogram(title: str, groups: Sequence[Floats], styles: Sequence[str], *, x_label: str, y_label: str, bins: int = 32) -> str:
    """Stacked counts by group. The range ends at the 99.5th percentile; what lies beyond counts in the last bar."""
    values = np.concatenate(groups)
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    high = high if high > low else low + 1.0
    counts = np.array([np.histogram(np.clip(group, low, high), bins, (low, high))[0] for group in groups])
    frame = _Frame((low, high), (0.0, 1.06 * max(1, int(counts.sum(0).max()))), WIDTH)
    parts = [frame.axes(x_label, y_label)]
    width = (frame.x(high) - frame.x(low)) / bins
    base = np.zeros(bins)
    for row, style in zip(counts, styles, strict=True):
        bars = [
            f"M{frame.x(low) + i * width + 0.5:.1f} {frame.y(base[i]):.1f}v{frame.y(base[i] + n) - frame.y(base[i]):.1f}"
            f"h{width - 1:.1f}V{frame.y(base[i]):.1f}z"
            for i, n in enumerate(row) if n
        ]  # fmt: skip
        parts.append(f'<path class="bar {style}" d="{"".join(bars)}"/>')
        base = base + row
    return _svg(title, parts, WIDTH)


def scatter(
    title: str, groups: Sequence[tuple[Floats, Floats]], styles: Sequence[str], *, x_label: str, y_label: str,
    width: int = WIDTH,
) -> str:  # fmt: skip
    """Dots by group, as they are given (see `thin`)."""
    x_range, y_range = (_range(np.concatenate([group[axis] for group in groups]), 0.03) for axis in (0, 1))
    frame = _Frame(x_range, y_range, width)
    parts = [frame.axes(x_label, y_label)]
    for (x, y), style in zip(groups, styles, strict=True):
        dots = "".join(f"M{frame.x(a):.1f} {frame.y(b):.1f}h0" for a, b in zip(x, y, strict=True))
        parts.append(f'<path class="dots soft {style}" d="{dots}"/>')
    return _svg(title, parts, width)


def thin(size: int, limit: int = MAX_DOTS) -> NDArray[np.int64]:
    """At most `limit` positions of 0..size-1, evenly spaced, always the same."""
    return np.unique(np.linspace(0, size - 1, min(size, limit)).round().astype(np.int64)) if size else np.empty(0, np.int64)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers (1, 2, 5 x 10^n) within a range, at most about `count`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A number as a person writes it: 0.25, 12k, 3·10⁻⁴."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1e4:
        scale, suffix = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / scale:.4g}{suffix}"
    if abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{value / 10.0**exponent:.3g}·10{power}"
    return f"{value:.4g}"


class _Frame:
    """Maps data to the plot's rectangle, and draws its axes."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], width: int) -> None:
        self.x_range, self.y_range, self.right = x_range, y_range, width - RIGHT
        self.x = _scale(x_range, (LEFT, self.right))
        self.y = _scale(y_range, (HEIGHT - BOTTOM, TOP))

    def axes(self, x_label: str, y_label: str) -> str:
        """Grid, ticks and labels."""
        bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
        parts = []
        for value in ticks(*self.y_range, 5):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.right}"/>'
                         f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>')
        for value in ticks(*self.x_range, self.right // 85):
            x = self.x(value)
            parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
                         f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick_text(value)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{self.right}"/>')
        parts.append(f'<text class="name" x="{(LEFT + self.right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
                     f"{html.escape(x_label)}</text>")
        parts.append(f'<text class="name" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
                     f"{html.escape(y_label)}</text>")
        return "".join(parts)


def _scale(source: tuple[float, float], target: tuple[float, float]) -> Callable[[float], float]:
    factor = (target[1] - target[0]) / (source[1] - source[0])
    return lambda value: target[0] + (float(value) - source[0]) * factor


def _range(values: Sequence[float] | Floats, pad: float, floor: float | None = None) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    if high - low < 1e-12 * max(1.0, abs(high)):  # one value: some room on both sides
        low, high = low - max(abs(low) * 0.1, 1e-9), high + max(abs(high) * 0.1, 1e-9)
    room = (high - low) * pad
    return (low - room if floor is None else max(floor, low - room)), high + room


def _band(frame: _Frame, band: Band, index: int) -> str:
    left, right = frame.x(band.start), frame.x(band.stop)
    size = f'width="{right - left:.1f}" height="{HEIGHT - BOTTOM - TOP}"'
    shade = f'<rect class="band b{index % 2}" x="{left:.1f}" y="{TOP}" {size}/>'
    number = band.label.split()[-1]
    label = next((text for text in (band.label, number) if right - left > 7 * len(text) + 4), "")
    return shade + f'<text x="{(left + right) / 2:.1f}" y="{TOP - 8}" text-anchor="middle">{html.escape(label)}</text>'


def _svg(title: str, parts: Sequence[str], width: int) -> str:
    name = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>{"".join(parts)}</svg>'
