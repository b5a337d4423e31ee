"use strict";

// Plots take the colours of the page, light or dark.
const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim();
  const line = style.getPropertyValue("--line").trim();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  return {
    margin: { l: 60, r: 24, t: 24, b: 56 },
    ...layout,
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, size: 12.5, family: "system-ui, sans-serif" },
    hoverlabel: { align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: "#8a94a3", activecolor: text },
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

function draw() {
  for (const plot of plots) {
    const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    Plotly.react(plot.key, plot.data, themed(plot.layout), options);
  }
}

draw();
dark.addEventListener("change", draw);

// A click on a heading sorts its table; a second click turns it round. Unknown values stay last.
for (const heading of document.querySelectorAll("th[data-key]")) {
  heading.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const at = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") === "descending";
    const value = (row) => row.cells[at].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const by = at === 0 ? x.localeCompare(y) : Number(x) - Number(y);
      return up ? by : -by;
    });
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  });
}
