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
const by = document.getElementById("by-heat");
function lay(card, heat, chosen) {
  card.querySelectorAll(".over").forEach(old => old.remove());
  const words = card.querySelector(".words"), maps = heat[by.value];
  words.hidden = !maps;
  [...words.children].forEach((word, number) => word.setAttribute("aria-pressed", number === chosen));
  if (maps) [...card.querySelectorAll(".seen")].forEach((place, number) => {
    const over = new Image(), sides = ["left", "top", "width", "height"];
    over.className = "over"; over.src = maps[chosen][number]; over.alt = "";
    sides.forEach((side, at) => { over.style[side] = heat.places[number][at] + "%"; });
    place.append(over);
  });
}
if (by) {
  const all = JSON.parse(document.getElementById("heat").textContent);
  const cards = [...document.querySelectorAll("#gallery article")].filter(card => card.querySelector(".words"));
  cards.forEach((card, number) => [...card.querySelector(".words").children].forEach(
    (word, chosen) => word.addEventListener("click", () => lay(card, all[number], chosen))));
  by.addEventListener("change", () => cards.forEach((card, number) => lay(card, all[number],
    all[number].words.reduce((longest, word, at, words) => word.length > words[longest].length ? at : longest, 0))));
}
