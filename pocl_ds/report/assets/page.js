"use strict";
// Draws all charts, and again if the window, the color scheme or the medium changes.

function drawAll() {
  for (const chart of CHARTS) chart.draw();
}

let windowWidth = document.documentElement.clientWidth, resizeTimer;
window.addEventListener("resize", () => {
  clearTimeout(resizeTimer);
  resizeTimer = setTimeout(() => {
    const { clientWidth, classList } = document.documentElement;
    if (clientWidth === windowWidth || classList.contains("paper")) return;
    windowWidth = clientWidth;
    drawAll();
  }, 120);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// Printed charts are light and as wide as the paper.
window.addEventListener("beforeprint", () => {
  document.documentElement.classList.add("paper");
  drawAll();
});
window.addEventListener("afterprint", () => {
  document.documentElement.classList.remove("paper");
  drawAll();
});

// The menu of the table of benchmarks.
const benchmarkMenu = document.getElementById("benchmarks");
if (benchmarkMenu) {
  const rows = [...document.querySelectorAll("#details [data-row]")];
  addOption(benchmarkMenu, "", "all");
  for (const name of new Set(rows.map((row) => row.dataset.row))) addOption(benchmarkMenu, name, name);
  benchmarkMenu.addEventListener("change", () => {
    for (const row of rows) row.hidden = benchmarkMenu.value !== "" && row.dataset.row !== benchmarkMenu.value;
  });
}

drawAll();
