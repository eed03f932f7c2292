"use strict";
// Charts of the page, on canvas, by uPlot: lines over steps with stage bands, stacked bars, and the plane of difficulty.
// What they show is in the page's data; texts reach the page as text nodes only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 280, DOT = 5, REACH = 14; // CSS pixels
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)); // steps of an axis
const SMALL = "12px system-ui, sans-serif";

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function make(tag, parent, text, css) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (css) node.className = css;
  if (parent) parent.append(node);
  return node;
}

// A number as a person writes it: 0.25, 12k, 3·10⁻⁴.
function say(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size < 1e-12) return "0";
  if (size >= 1e6) return plain(value / 1e6, digits) + "M";
  if (size >= 1e4) return plain(value / 1e3, digits) + "k";
  if (size >= 1e-3) return plain(value, digits);
  const exponent = Math.floor(Math.log10(size) + 1e-9);
  const power = String(exponent).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
  return plain(value / 10 ** exponent, 3) + "·10" + power;
}

function plain(value, digits) {
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

function axis(label, extra) {
  return {
    label, stroke: colour("soft"), font: SMALL, labelFont: "13px system-ui, sans-serif", labelGap: 2, labelSize: 22,
    grid: { stroke: colour("grid"), width: 1 }, ticks: { stroke: colour("grid"), width: 1, size: 5 },
    values: (u, splits) => splits.map((value) => say(value)), ...extra,
  };
}

function axes(spec) {
  const widest = (u, values) => Math.max(34, 14 + 7 * Math.max(...(values || [""]).map((text) => String(text).length)));
  const incrs = spec.whole ? { incrs: WHOLE } : {};
  return [axis(spec.x, { space: 70, size: 30, ...incrs }), axis(spec.y, { size: widest, space: 40 })];
}

// Room around values; a single value gets some on both sides.
function padded(low, high, fromZero, share) {
  if (low === null || low === undefined || high === null) return [0, 1];
  if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
    const room = Math.abs(low) * 0.1 || 1;
    return [fromZero && low >= 0 ? 0 : low - room, high + room];
  }
  const room = share * (high - low);
  return [fromZero ? Math.min(0, low) : low - room, high + room];
}

class Chart {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.place = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.hidden = new Set();
    this.place.tabIndex = 0;
    this.place.setAttribute("role", "img");
    this.place.setAttribute("aria-label", this.summary());
    this.place.addEventListener("keydown", (event) => this.key(event));
    this.keys = this.entries().map((entry, i) => this.entry(entry, i));
    this.reset = make("button", this.legend, "zoom out", "reset");
    this.reset.type = "button";
    this.reset.hidden = true;
    this.reset.addEventListener("click", () => this.home());
  }

  // One button of the legend: it shows the value under the cursor, and hides its series.
  entry({ name, tint, dash }, i) {
    const button = make("button", this.legend, undefined, "key");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const swatch = make("canvas", button);
    swatch.width = 44;
    swatch.height = 20;
    make("span", button, name);
    const value = make("b", button, "");
    button.addEventListener("click", () => {
      const shown = !this.hidden.delete(i);
      if (shown) this.hidden.add(i);
      button.setAttribute("aria-pressed", String(!shown));
      this.show(i, !shown);
    });
    return { value, swatch, tint, dash };
  }

  paintKeys() {
    for (const { swatch, tint, dash } of this.keys) {
      const context = swatch.getContext("2d");
      context.clearRect(0, 0, 44, 20);
      context.strokeStyle = colour(tint);
      context.lineWidth = this.spec.kind === "lines" ? 5 : 20;
      context.setLineDash((dash || []).map((length) => 2 * length));
      context.beginPath();
      context.moveTo(this.spec.kind === "lines" ? 0 : 12, 10);
      context.lineTo(this.spec.kind === "lines" ? 44 : 32, 10);
      context.stroke();
    }
  }

  draw() {
    const width = Math.max(220, this.place.clientWidth), height = this.spec.wide ? HEIGHT + 50 : HEIGHT;
    if (this.plot) this.plot.destroy();
    this.paintKeys();
    this.plot = new uPlot({
      width, height, legend: { show: false }, axes: axes(this.spec), padding: [this.spec.bands?.length ? 22 : 10, 14, 0, 0],
      ...this.options(), hooks: {
        setCursor: [() => this.tell()], drawClear: [(u) => this.bands(u)], setScale: [(u, key) => key === "x" && this.zoomed(u)],
        ...(this.options().hooks || {}),
      },
    }, this.data(), this.place);
    for (const i of this.hidden) this.show(i, false);
  }

  bands(u) {
    const { left, top, width, height } = u.bbox, context = u.ctx;
    (this.spec.bands || []).forEach(([start, stop, label], i) => {
      const from = Math.max(left, u.valToPos(start, "x", true)), to = Math.min(left + width, u.valToPos(stop, "x", true));
      if (to <= from) return;
      context.save();
      context.fillStyle = colour(i % 2 ? "band1" : "band0");
      context.fillRect(from, top, to - from, height);
      context.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
      context.fillStyle = colour("soft");
      context.textAlign = "center";
      const text = [label, label.split(" ").pop()].find((one) => context.measureText(one).width + 8 < to - from);
      if (text) context.fillText(text, (from + to) / 2, top - 7 * devicePixelRatio);
      context.restore();
    });
  }

  zoomed(u) {
    const [low, high] = this.range(), room = 1e-6 * (high - low);
    this.reset.hidden = !(u.scales.x.min > low + room || u.scales.x.max < high - room);
  }

  // The range of all data, which uPlot finds by itself, becomes that of bands and bars.
  whole(low, high) {
    const xs = this.data()[0];
    return low === null || (low === xs[0] && high === xs[xs.length - 1]) ? this.range() : [low, high];
  }

  home() {
    const [min, max] = this.range();
    this.plot.setScale("x", { min, max });
  }

  show(i, shown) {
    this.plot.setSeries(i + 1, { show: shown });
  }

  key(event) {
    const u = this.plot, { min, max } = u.scales.x, middle = (min + max) / 2;
    const steps = { ArrowLeft: -1, ArrowRight: 1 }, zooms = { "+": 0.5, "=": 0.5, "-": 2 };
    if (event.key in steps && u.data[0]) {
      const last = u.data[0].length - 1;
      this.at = Math.min(last, Math.max(0, (this.at ?? u.cursor.idx ?? 0) + steps[event.key] * (event.shiftKey ? 10 : 1)));
      u.setCursor({ left: u.valToPos(u.data[0][this.at], "x"), top: u.over.clientHeight / 2 });
    } else if (event.key in zooms) {
      const [low, high] = this.range(), half = (zooms[event.key] * (max - min)) / 2;
      u.setScale("x", { min: Math.max(low, middle - half), max: Math.min(high, middle + half) });
    } else if (event.key === "Escape") {
      this.home();
    } else {
      return;
    }
    event.preventDefault();
  }
}

class Lines extends Chart {
  entries() {
    return this.spec.series.map((one) => ({ name: one.name, tint: one.colour, dash: one.dash }));
  }

  summary() {
    const ends = this.spec.series.map((one) => {
      const shown = one.ys.filter((value) => value !== null);
      return `${one.name} from ${say(shown[0])} to ${say(shown[shown.length - 1])}`;
    });
    return `${this.spec.title}, ${this.spec.y} over ${this.spec.x}: ${ends.join("; ")}`;
  }

  data() {
    this.joined ??= uPlot.join(this.spec.series.map((one) => [one.xs, one.ys]));
    return this.joined;
  }

  range() {
    const xs = this.data()[0], bands = this.spec.bands;
    const ends = [xs[0], xs[xs.length - 1], ...bands.flatMap(([start, stop]) => [start, stop])];
    return padded(Math.min(...ends), Math.max(...ends), false, 0);
  }

  options() {
    const series = this.spec.series.map((one) => ({
      label: one.name, stroke: colour(one.colour), width: 2, dash: one.dash, spanGaps: true,
      paths: one.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
      points: { show: one.dots || one.xs.length < 2, size: 7, fill: colour(one.colour) },
    }));
    return {
      cursor: { sync: { key: "steps" }, drag: { x: true, y: false, dist: 8 }, points: { size: 7 } },
      scales: {
        x: { time: false, range: (u, low, high) => this.whole(low, high) },
        y: { range: (u, low, high) => padded(low, high, this.spec.zero, 0.06) },
      },
      series: [{}, ...series],
    };
  }

  tell() {
    const { idx } = this.plot ? this.plot.cursor : {}, data = this.data();
    const at = idx === null || idx === undefined ? "" : ` @ ${say(data[0][idx], 6)}`;
    this.keys.forEach(({ value }, i) => {
      const known = idx === null || idx === undefined ? null : data[i + 1][idx];
      value.textContent = known === null || known === undefined ? "" : say(known) + at;
    });
  }
}

class Bars extends Chart {
  entries() {
    return this.spec.names.map((name, i) => ({ name, tint: "s" + i }));
  }

  summary() {
    const counts = this.spec.counts.map((row, i) => `${this.spec.names[i]} ${row.reduce((a, b) => a + b, 0)}`);
    return `${this.spec.title}, number of samples by ${this.spec.x}: ${counts.join("; ")}`;
  }

  // Each subset stands on those before it, as far as they are shown; the tallest is drawn first.
  data() {
    const { edges, counts } = this.spec, heights = edges.slice(1).map(() => 0);
    const stacked = counts.map((row, i) => {
      if (!this.hidden.has(i)) row.forEach((count, bin) => { heights[bin] += count; });
      return [...heights];
    });
    return [edges.slice(1).map((edge, i) => (edge + edges[i]) / 2), ...stacked.reverse()];
  }

  range() {
    const { edges } = this.spec;
    return [edges[0], edges[edges.length - 1]];
  }

  options() {
    const series = this.spec.names.map((name, i) => ({
      label: name, fill: colour("s" + i), stroke: colour("s" + i), width: 0, points: { show: false },
      paths: uPlot.paths.bars({ size: [0.92, 60] }),
    }));
    return {
      cursor: { points: { show: false }, drag: { x: true, y: false, dist: 8 } },
      scales: {
        x: { time: false, range: (u, low, high) => this.whole(low, high) },
        y: { range: (u, low, high) => [0, 1.06 * Math.max(1, high ?? 1)] },
      },
      series: [{}, ...series.reverse()],
    };
  }

  show() {
    this.plot.setData(this.data(), false);
    this.plot.redraw(true, true);
  }

  tell() {
    const { idx } = this.plot ? this.plot.cursor : {};
    this.keys.forEach(({ value }, i) => {
      value.textContent = idx === null || idx === undefined ? "" : say(this.spec.counts[i][idx], 6);
    });
  }
}
