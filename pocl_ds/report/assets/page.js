"use strict";
// Draws everything once, and again where the window, the light or the paper changes.

function drawAll() {
  for (const chart of CHARTS) chart.draw();
}

let width = document.documentElement.clientWidth, waiting;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (document.documentElement.clientWidth === width || document.documentElement.classList.contains("paper")) return;
    width = document.documentElement.clientWidth;
    drawAll();
  }, 120);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// Paper is white, and as wide as paper is.
window.addEventListener("beforeprint", () => {
  document.documentElement.classList.add("paper");
  drawAll();
});
window.addEventListener("afterprint", () => {
  document.documentElement.classList.remove("paper");
  drawAll();
});

const menu = document.getElementById("benchmarks");
if (menu) {
  const rows = [...document.querySelectorAll("#details [data-row]")];
  option(menu, "", "all");
  for (const name of new Set(rows.map((row) => row.dataset.row))) option(menu, name, name);
  menu.addEventListener("change", () => {
    for (const row of rows) row.hidden = menu.value !== "" && row.dataset.row !== menu.value;
  });
}

drawAll();
