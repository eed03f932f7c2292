"use strict";
// Charts on canvas, drawn by uPlot: line charts over optimizer steps with stage bands, and histograms by subset.
// The data of the page define the charts. Texts from data reach the page only as text nodes.

const DATA = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 280, WIDE_HEIGHT = 330; // CSS pixels
const INTEGER_INCREMENTS = [0, 1, 2, 3, 4, 5, 6].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));
const SMALL_FONT = "12px system-ui, sans-serif", LABEL_FONT = "13px system-ui, sans-serif";

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function addElement(tag, parent, text, css) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (css) element.className = css;
  if (parent) parent.append(element);
  return element;
}

// A number as text: 0.25, 12k, 3·10⁻⁴.
function formatNumber(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size < 1e-12) return "0";
  if (size >= 1e6) return formatDigits(value / 1e6, digits) + "M";
  if (size >= 1e4) return formatDigits(value / 1e3, digits) + "k";
  if (size >= 1e-3) return formatDigits(value, digits);
  const exponent = Math.floor(Math.log10(size) + 1e-9);
  const power = String(exponent).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  return formatDigits(value / 10 ** exponent, 3) + "·10" + power;
}

function formatDigits(value, digits) {
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

function axis(label, options) {
  return {
    label, stroke: cssColor("soft"), font: SMALL_FONT, labelFont: LABEL_FONT, labelGap: 2, labelSize: 22,
    grid: { stroke: cssColor("grid"), width: 1 }, ticks: { stroke: cssColor("grid"), width: 1, size: 5 },
    values: (plot, splits) => splits.map((value) => formatNumber(value)), ...options,
  };
}

function axes(spec) {
  const width = (plot, values) => Math.max(34, 14 + 7 * Math.max(...(values || [""]).map((text) => String(text).length)));
  const increments = spec.integers ? { incrs: INTEGER_INCREMENTS } : {};
  return [axis(spec.x, { space: 70, size: 30, ...increments }), axis(spec.y, { size: width, space: 40 })];
}

// The range of an axis: the values with a margin, which is a share of their range.
function paddedRange(low, high, fromZero, share) {
  if (low === null || low === undefined || high === null) return [0, 1];
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
    const margin = Math.abs(low) * 0.1 || 1;
    return [fromZero && low >= 0 ? 0 : low - margin, high + margin];
  }
  const margin = share * (high - low);
  return [fromZero ? Math.min(0, low) : low - margin, high + margin];
}

class Chart {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.container = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.hidden = new Set();
    this.container.tabIndex = 0;
    this.container.setAttribute("role", "img");
    this.container.setAttribute("aria-label", this.summary());
    this.container.addEventListener("keydown", (event) => this.handleKey(event));
    this.keys = this.legendEntries().map((entry, i) => this.addLegendKey(entry, i));
    this.resetButton = addElement("button", this.legend, "zoom out", "reset");
    this.resetButton.type = "button";
    this.resetButton.hidden = true;
    this.resetButton.addEventListener("click", () => this.resetZoom());
  }

  // A button of the legend. It shows the value under the cursor; a click hides its series.
  addLegendKey({ name, color, dash }, i) {
    const button = addElement("button", this.legend, undefined, "key");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const swatch = addElement("canvas", button);
    swatch.width = 44;
    swatch.height = 20;
    addElement("span", button, name);
    const value = addElement("b", button, "");
    button.addEventListener("click", () => {
      const visible = this.hidden.delete(i);
      if (!visible) this.hidden.add(i);
      button.setAttribute("aria-pressed", String(visible));
      this.setVisible(i, visible);
    });
    return { value, swatch, color, dash };
  }

  drawSwatches() {
    const isLine = this.spec.kind === "lines";
    for (const { swatch, color, dash } of this.keys) {
      const context = swatch.getContext("2d");
      context.clearRect(0, 0, 44, 20);
      context.strokeStyle = cssColor(color);
      context.lineWidth = isLine ? 5 : 20;
      context.setLineDash((dash || []).map((length) => 2 * length));
      context.beginPath();
      context.moveTo(isLine ? 0 : 12, 10);
      context.lineTo(isLine ? 44 : 32, 10);
      context.stroke();
    }
  }

  draw() {
    if (this.plot) this.plot.destroy();
    this.drawSwatches();
    const options = this.options();
    this.plot = new uPlot({
      width: Math.max(220, this.container.clientWidth), height: this.spec.wide ? WIDE_HEIGHT : HEIGHT,
      legend: { show: false }, axes: axes(this.spec), padding: [this.spec.bands?.length ? 22 : 10, 14, 0, 0],
      ...options,
      hooks: {
        setCursor: [() => this.showValues()],
        drawClear: [(plot) => this.drawBands(plot)],
        setScale: [(plot, key) => key === "x" && this.updateResetButton(plot)],
        ...(options.hooks || {}),
      },
    }, this.data(), this.container);
    for (const i of this.hidden) this.setVisible(i, false);
  }

  // The stages, as bands with labels above the plot.
  drawBands(plot) {
    const { left, top, width, height } = plot.bbox, context = plot.ctx;
    (this.spec.bands || []).forEach(([start, stop, label], i) => {
      const from = Math.max(left, plot.valToPos(start, "x", true));
      const to = Math.min(left + width, plot.valToPos(stop, "x", true));
      if (to <= from) return;
      context.save();
      context.fillStyle = cssColor(i % 2 ? "band1" : "band0");
      context.fillRect(from, top, to - from, height);
      context.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
      context.fillStyle = cssColor("soft");
      context.textAlign = "center";
      // A narrow band has only the number of its stage.
      const fits = (text) => context.measureText(text).width + 8 < to - from;
      const text = [label, label.split(" ").pop()].find(fits);
      if (text) context.fillText(text, (from + to) / 2, top - 7 * devicePixelRatio);
      context.restore();
    });
  }

  updateResetButton(plot) {
    const [low, high] = this.range(), tolerance = 1e-6 * (high - low);
    const { min, max } = plot.scales.x;
    this.resetButton.hidden = !(min > low + tolerance || max < high - tolerance);
  }

  // uPlot's range of all data is extended to the range of bands and bars.
  extendFullRange(low, high) {
    const xs = this.data()[0];
    return low === null || (low === xs[0] && high === xs[xs.length - 1]) ? this.range() : [low, high];
  }

  resetZoom() {
    const [min, max] = this.range();
    this.plot.setScale("x", { min, max });
  }

  setVisible(i, visible) {
    this.plot.setSeries(i + 1, { show: visible });
  }

  handleKey(event) {
    const plot = this.plot, { min, max } = plot.scales.x, middle = (min + max) / 2;
    const moves = { ArrowLeft: -1, ArrowRight: 1 }, zooms = { "+": 0.5, "=": 0.5, "-": 2 };
    if (event.key in moves && plot.data[0]) {
      const lastIndex = plot.data[0].length - 1, move = moves[event.key] * (event.shiftKey ? 10 : 1);
      this.cursorIndex = Math.min(lastIndex, Math.max(0, (this.cursorIndex ?? plot.cursor.idx ?? 0) + move));
      plot.setCursor({ left: plot.valToPos(plot.data[0][this.cursorIndex], "x"), top: plot.over.clientHeight / 2 });
    } else if (event.key in zooms) {
      const [low, high] = this.range(), half = (zooms[event.key] * (max - min)) / 2;
      plot.setScale("x", { min: Math.max(low, middle - half), max: Math.min(high, middle + half) });
    } else if (event.key === "Escape") {
      this.resetZoom();
    } else {
      return;
    }
    event.preventDefault();
  }
}

class LineChart extends Chart {
  legendEntries() {
    return this.spec.series.map(({ name, color, dash }) => ({ name, color, dash }));
  }

  summary() {
    const ranges = this.spec.series.map((series) => {
      const values = series.ys.filter((value) => value !== null);
      return `${series.name} from ${formatNumber(values[0])} to ${formatNumber(values[values.length - 1])}`;
    });
    return `${this.spec.title}, ${this.spec.y} over ${this.spec.x}: ${ranges.join("; ")}`;
  }

  data() {
    this.joined ??= uPlot.join(this.spec.series.map((series) => [series.xs, series.ys]));
    return this.joined;
  }

  range() {
    const xs = this.data()[0];
    const ends = [xs[0], xs[xs.length - 1], ...this.spec.bands.flatMap(([start, stop]) => [start, stop])];
    return paddedRange(Math.min(...ends), Math.max(...ends), false, 0);
  }

  options() {
    const series = this.spec.series.map(({ name, color, dash, stepped, markers, xs }) => ({
      label: name, stroke: cssColor(color), width: 2, dash, spanGaps: true,
      paths: stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      points: { show: markers || xs.length < 2, size: 7, fill: cssColor(color) },
    }));
    return {
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false, dist: 8 }, points: { size: 7 } },
      scales: {
        x: { time: false, range: (plot, low, high) => this.extendFullRange(low, high) },
        y: { range: (plot, low, high) => paddedRange(low, high, this.spec.from_zero, 0.06) },
      },
      series: [{}, ...series],
    };
  }

  showValues() {
    const index = this.plot?.cursor.idx ?? null, data = this.data();
    const step = index === null ? "" : ` @ ${formatNumber(data[0][index], 6)}`;
    this.keys.forEach(({ value }, i) => {
      const number = index === null ? null : data[i + 1][index];
      value.textContent = number === null || number === undefined ? "" : formatNumber(number) + step;
    });
  }
}

class Histogram extends Chart {
  legendEntries() {
    return this.spec.names.map((name, i) => ({ name, color: "s" + i }));
  }

  summary() {
    const counts = this.spec.counts.map((row, i) => `${this.spec.names[i]} ${row.reduce((a, b) => a + b, 0)}`);
    return `${this.spec.title}, number of samples by ${this.spec.x}: ${counts.join("; ")}`;
  }

  // The bars of visible subsets are stacked; the tallest stack is drawn first.
  data() {
    const { edges, counts } = this.spec, heights = edges.slice(1).map(() => 0);
    const stacks = counts.map((row, i) => {
      if (!this.hidden.has(i)) row.forEach((count, bin) => { heights[bin] += count; });
      return [...heights];
    });
    return [edges.slice(1).map((edge, i) => (edge + edges[i]) / 2), ...stacks.reverse()];
  }

  range() {
    const { edges } = this.spec;
    return [edges[0], edges[edges.length - 1]];
  }

  options() {
    const series = this.spec.names.map((name, i) => ({
      label: name, fill: cssColor("s" + i), stroke: cssColor("s" + i), width: 0, points: { show: false },
      paths: uPlot.paths.bars({ size: [0.92, 60] }),
    }));
    return {
      cursor: { points: { show: false }, drag: { x: true, y: false, dist: 8 } },
      scales: {
        x: { time: false, range: (plot, low, high) => this.extendFullRange(low, high) },
        y: { range: (plot, low, high) => [0, 1.06 * Math.max(1, high ?? 1)] },
      },
      series: [{}, ...series.reverse()],
    };
  }

  setVisible() {
    this.plot.setData(this.data(), false);
    this.plot.redraw(true, true);
  }

  showValues() {
    const index = this.plot?.cursor.idx ?? null;
    this.keys.forEach(({ value }, i) => {
      value.textContent = index === null ? "" : formatNumber(this.spec.counts[i][index], 6);
    });
  }
}
