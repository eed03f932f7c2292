"use strict";
// The plane of difficulty: a dot a sample, coloured by subset.

class Plane extends Chart {
  entries() {
    return this.spec.names.map((name, i) => ({ name, tint: "s" + i }));
  }

  summary() {
    return `${this.spec.title}: ${this.spec.xs.length} samples as dots, ${this.spec.x} to the right, ${this.spec.y} up. ` +
      "The list of training samples holds the same numbers.";
  }

  groups() {
    return this.spec.names.map((name, i) => {
      const [from, to] = [this.spec.bounds[i], this.spec.bounds[i + 1]];
      const picked = this.spec.places.flatMap((place, at) => (place >= from && place < to ? [at] : []));
      return { picked, xs: picked.map((at) => this.spec.xs[at]), ys: picked.map((at) => this.spec.ys[at]) };
    });
  }

  data() {
    this.grouped ??= this.groups();
    return [null, ...this.grouped.map(({ xs, ys }) => [xs, ys])];
  }

  range() {
    return padded(...extent(this.spec.xs), false, 0.03);
  }

  options() {
    const [x, y] = [this.range(), padded(...extent(this.spec.ys), false, 0.03)];
    const keep = (whole) => (u, low, high) => (this.plot && low !== null && high - low > 0 && u.status ? [low, high] : whole);
    return {
      mode: 2, cursor: { points: { show: false }, drag: { x: true, y: true, uni: 20, dist: 8 } },
      scales: { x: { time: false, auto: false, range: keep(x) }, y: { auto: false, range: keep(y) } },
      series: [null, ...this.spec.names.map((name, i) => ({ label: name, stroke: colour("s" + i), paths: dots }))],
      hooks: { ready: [(u) => { u.status = 1; this.rest(u); this.listen(u); }] },
    };
  }

  rest(u) {
    const [x, y] = [this.range(), padded(...extent(this.spec.ys), false, 0.03)];
    u.setScale("x", { min: x[0], max: x[1] });
    u.setScale("y", { min: y[0], max: y[1] });
  }

  home() {
    this.rest(this.plot);
  }

  listen(u) {
    this.tip = make("div", u.over, undefined, "tip");
    this.tip.hidden = true;
    u.over.addEventListener("dblclick", () => this.home());
    u.over.addEventListener("click", () => {
      if (this.near && window.showSample) window.showSample(this.spec.places[this.near.at]);
    });
  }

  // The dot next to the cursor, among those that are shown.
  nearest(u) {
    const { left, top } = u.cursor;
    let best = null, reach = REACH * REACH;
    if (left === null || left < 0) return null;
    const [x0, y0] = [u.posToVal(left, "x"), u.posToVal(top, "y")];
    const [dx, dy] = [u.over.clientWidth / (u.scales.x.max - u.scales.x.min), u.over.clientHeight / (u.scales.y.max - u.scales.y.min)];
    this.grouped.forEach(({ picked, xs, ys }, subset) => {
      if (this.hidden.has(subset)) return;
      for (let i = 0; i < xs.length; i++) {
        const distance = ((xs[i] - x0) * dx) ** 2 + ((ys[i] - y0) * dy) ** 2;
        if (distance < reach) [best, reach] = [{ at: picked[i], x: xs[i], y: ys[i], subset }, distance];
      }
    });
    return best;
  }

  tell() {
    const u = this.plot;
    if (!u || !this.tip) return;
    this.near = this.nearest(u);
    this.tip.hidden = !this.near;
    u.over.classList.toggle("near", Boolean(this.near));
    if (!this.near) return;
    const { at, x, y, subset } = this.near;
    this.tip.textContent = `#${this.spec.places[at] + 1}, ${this.spec.names[subset]}: cross-entropy ${say(x)}, ROUGE-L ${say(y)}`;
    const [left, top] = [u.valToPos(x, "x"), u.valToPos(y, "y")];
    this.tip.style.left = Math.max(0, Math.min(left + 10, u.over.clientWidth - this.tip.offsetWidth)) + "px";
    this.tip.style.top = (top > 50 ? top - this.tip.offsetHeight - 10 : top + 12) + "px";
  }
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// Tens of thousands of dots: one is painted once and stamped, which is ten times as fast as so many arcs.
function dots(u, index) {
  const size = Math.round(DOT * devicePixelRatio), stamp = document.createElement("canvas");
  stamp.width = stamp.height = size;
  const pen = stamp.getContext("2d");
  pen.fillStyle = u.series[index].stroke(u, index);
  pen.globalAlpha = 0.75;
  pen.beginPath();
  pen.arc(size / 2, size / 2, size / 2, 0, 2 * Math.PI);
  pen.fill();
  uPlot.orient(u, index, (series, xs, ys, scaleX, scaleY, toX, toY, offX, offY, dimX, dimY) => {
    const [, groupX, groupY] = [null, ...u.data[index]];
    const { left, top, width, height } = u.bbox;
    u.ctx.save();
    u.ctx.beginPath();
    u.ctx.rect(left, top, width, height);
    u.ctx.clip();
    for (let i = 0; i < groupX.length; i++) {
      u.ctx.drawImage(stamp, toX(groupX[i], scaleX, dimX, offX) - size / 2, toY(groupY[i], scaleY, dimY, offY) - size / 2);
    }
    u.ctx.restore();
  });
  return null;
}

const KINDS = { lines: Lines, bars: Bars, plane: Plane };
const CHARTS = [...document.querySelectorAll("[data-chart]")].map((figure) => {
  const spec = DATA.charts[Number(figure.dataset.chart)];
  return new KINDS[spec.kind](figure, spec);
});
