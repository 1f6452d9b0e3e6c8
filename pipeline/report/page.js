"use strict";
const specs = JSON.parse(document.getElementById("charts").textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  const dim = colour("--dim"), line = colour("--line"), ink = colour("--ink"), font = "system-ui, sans-serif";
  const text = {labelColor: dim, titleColor: dim, labelFont: font, titleFont: font, titleFontWeight: "normal"};
  const config = {background: "transparent", view: {stroke: null},
    axis: {...text, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 11},
    legend: {...text, labelFontSize: 12}, title: {color: ink, font: font, fontSize: 13, anchor: "start", fontWeight: 600},
    range: {category: ["--one", "--two", "--three", "--four", "--five", "--six", "--seven", "--eight"].map(colour)}};
  for (const [place, spec] of Object.entries(specs))
    vegaEmbed(document.getElementById(place), spec, {actions: false, renderer: "svg", config: config});
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
const right = document.getElementById("by-right"), kind = document.getElementById("by-kind");
function sift() {
  let shown = 0;
  for (const card of document.querySelectorAll("#gallery article")) {
    const fits = (!right.value || card.dataset.is.split(" ").includes(right.value)) && (!kind.value || card.dataset.kind === kind.value);
    card.hidden = !fits;
    shown += fits;
  }
  document.getElementById("shown").textContent = shown + " shown";
}
if (right) { right.addEventListener("change", sift); kind.addEventListener("change", sift); sift(); }
