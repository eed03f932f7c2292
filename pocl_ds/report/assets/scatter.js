"use strict";
// The scatter chart of difficulty: one dot per sample, colored by subset. Creates all charts of the page.

const DOT_SIZE = 5, CURSOR_REACH = 14; // CSS pixels

class ScatterChart extends Chart {
  legendEntries() {
    return this.spec.names.map((name, i) => ({ name, color: "s" + i }));
  }

  summary() {
    return `${this.spec.title}: ${this.spec.xs.length} samples as dots, ${this.spec.x} to the right, ${this.spec.y} up. ` +
      "The list of training samples has the same numbers.";
  }

  // The dots of each subset: indices into the data, and coordinates.
  splitBySubset() {
    return this.spec.names.map((name, i) => {
      const [start, stop] = [this.spec.bounds[i], this.spec.bounds[i + 1]];
      const indices = this.spec.positions.flatMap((position, index) => (position >= start && position < stop ? [index] : []));
      return { indices, xs: indices.map((index) => this.spec.xs[index]), ys: indices.map((index) => this.spec.ys[index]) };
    });
  }

  data() {
    this.subsets ??= this.splitBySubset();
    return [null, ...this.subsets.map(({ xs, ys }) => [xs, ys])];
  }

  range() {
    return paddedRange(...extent(this.spec.xs), false, 0.03);
  }

  verticalRange() {
    return paddedRange(...extent(this.spec.ys), false, 0.03);
  }

  options() {
    const keepZoom = (full) => (plot, low, high) =>
      (this.plot && low !== null && high - low > 0 && plot.isReady ? [low, high] : full);
    return {
      mode: 2, cursor: { points: { show: false }, drag: { x: true, y: true, uni: 20, dist: 8 } },
      scales: {
        x: { time: false, auto: false, range: keepZoom(this.range()) },
        y: { auto: false, range: keepZoom(this.verticalRange()) },
      },
      series: [null, ...this.spec.names.map((name, i) => ({ label: name, stroke: cssColor("s" + i), paths: drawDots }))],
      hooks: { ready: [(plot) => { plot.isReady = true; this.showAll(plot); this.addListeners(plot); }] },
    };
  }

  showAll(plot) {
    const [x, y] = [this.range(), this.verticalRange()];
    plot.setScale("x", { min: x[0], max: x[1] });
    plot.setScale("y", { min: y[0], max: y[1] });
  }

  resetZoom() {
    this.showAll(this.plot);
  }

  addListeners(plot) {
    this.tip = addElement("div", plot.over, undefined, "tip");
    this.tip.hidden = true;
    plot.over.addEventListener("dblclick", () => this.resetZoom());
    plot.over.addEventListener("click", () => {
      if (this.nearest && window.showSample) window.showSample(this.spec.positions[this.nearest.index]);
    });
  }

  // The visible dot nearest to the cursor, within reach.
  nearestDot(plot) {
    const { left, top } = plot.cursor;
    if (left === null || left < 0) return null;
    const [x0, y0] = [plot.posToVal(left, "x"), plot.posToVal(top, "y")];
    const { x, y } = plot.scales;
    const [pixelsX, pixelsY] = [plot.over.clientWidth / (x.max - x.min), plot.over.clientHeight / (y.max - y.min)];
    let nearest = null, smallest = CURSOR_REACH ** 2;
    this.subsets.forEach(({ indices, xs, ys }, subset) => {
      if (this.hidden.has(subset)) return;
      for (let i = 0; i < xs.length; i++) {
        const distance = ((xs[i] - x0) * pixelsX) ** 2 + ((ys[i] - y0) * pixelsY) ** 2;
        if (distance < smallest) [nearest, smallest] = [{ index: indices[i], x: xs[i], y: ys[i], subset }, distance];
      }
    });
    return nearest;
  }

  showValues() {
    const plot = this.plot;
    if (!plot || !this.tip) return;
    this.nearest = this.nearestDot(plot);
    this.tip.hidden = !this.nearest;
    plot.over.classList.toggle("near", Boolean(this.nearest));
    if (!this.nearest) return;
    const { index, x, y, subset } = this.nearest;
    this.tip.textContent = `#${this.spec.positions[index] + 1}, ${this.spec.names[subset]}: ` +
      `cross-entropy ${formatNumber(x)}, ROUGE-L ${formatNumber(y)}`;
    const [left, top] = [plot.valToPos(x, "x"), plot.valToPos(y, "y")];
    this.tip.style.left = Math.max(0, Math.min(left + 10, plot.over.clientWidth - this.tip.offsetWidth)) + "px";
    this.tip.style.top = (top > 50 ? top - this.tip.offsetHeight - 10 : top + 12) + "px";
  }
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// Draws one dot and copies it, which for tens of thousands of dots is ten times as fast as drawing each.
function drawDots(plot, seriesIndex) {
  const size = Math.round(DOT_SIZE * devicePixelRatio), stamp = document.createElement("canvas");
  stamp.width = stamp.height = size;
  const context = stamp.getContext("2d");
  context.fillStyle = plot.series[seriesIndex].stroke(plot, seriesIndex);
  context.globalAlpha = 0.75;
  context.beginPath();
  context.arc(size / 2, size / 2, size / 2, 0, 2 * Math.PI);
  context.fill();
  uPlot.orient(plot, seriesIndex, (series, dataX, dataY, scaleX, scaleY, toX, toY, offsetX, offsetY, sizeX, sizeY) => {
    const [xs, ys] = plot.data[seriesIndex];
    const { left, top, width, height } = plot.bbox;
    plot.ctx.save();
    plot.ctx.beginPath();
    plot.ctx.rect(left, top, width, height);
    plot.ctx.clip();
    for (let i = 0; i < xs.length; i++) {
      const [x, y] = [toX(xs[i], scaleX, sizeX, offsetX), toY(ys[i], scaleY, sizeY, offsetY)];
      plot.ctx.drawImage(stamp, x - size / 2, y - size / 2);
    }
    plot.ctx.restore();
  });
  return null;
}

const CHART_CLASSES = { lines: LineChart, bars: Histogram, scatter: ScatterChart };
const CHARTS = [...document.querySelectorAll("[data-chart]")].map((figure) => {
  const spec = DATA.charts[Number(figure.dataset.chart)];
  return new CHART_CLASSES[spec.kind](figure, spec);
});
