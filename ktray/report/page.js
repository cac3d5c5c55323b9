// Sorting, filtering, highlighting one trial everywhere, and its spec on a click. The page is complete without it.
"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);

// --- one trial, wherever it is drawn

const marks = new Map();
for (const mark of document.querySelectorAll("[data-t]")) {
  const number = mark.dataset.t;
  if (!marks.has(number)) marks.set(number, []);
  marks.get(number).push(mark);
}
let hot = null;
function highlight(number) {
  if (number === hot) return;
  for (const mark of marks.get(hot) || []) mark.classList.remove("hot");
  for (const mark of marks.get(number) || []) mark.classList.add("hot");
  hot = number;
}
function trialOf(event) {
  const mark = event.target instanceof Element ? event.target.closest("[data-t]") : null;
  return mark ? mark.dataset.t : null;
}
document.addEventListener("pointerover", (event) => highlight(trialOf(event)));

// --- its spec

const dialog = document.createElement("dialog");
const heading = document.createElement("h2");
const lines = document.createElement("pre");
const close = document.createElement("button");
close.textContent = "Close";
close.type = "button";
close.addEventListener("click", () => dialog.close());
dialog.append(heading, close, lines);
document.body.append(dialog);
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

function show(number) {
  const own = specs.trials[number];
  if (!own) return;
  const spec = new Map(Object.entries(specs.base));
  for (const name of own.without) spec.delete(name);
  for (const [name, value] of Object.entries(own.set)) spec.set(name, value);
  heading.textContent = `Trial ${number}`;
  lines.replaceChildren();
  for (const [name, value] of spec) {
    const line = document.createElement("span");
    line.textContent = `${name}: ${value}\n`;
    if (Object.hasOwn(own.set, name)) line.className = "differs";
    lines.append(line);
  }
  dialog.showModal();
  dialog.scrollTop = 0;
}
document.addEventListener("click", (event) => {
  if (!dialog.open && !event.target.closest("a, button, input, summary")) {
    const number = trialOf(event);
    if (number !== null && String(getSelection()) === "") show(number);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("tr[data-t]")) show(event.target.dataset.t);
});
for (const row of document.querySelectorAll("tr[data-t]")) row.tabIndex = 0;
for (const hint of document.querySelectorAll(".with-script")) hint.hidden = false;

// --- tables that sort and filter

function valueOf(row, column) {
  const cell = row.cells[column];
  if (!cell) return null;
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const text = cell.textContent.trim();
  if (text === "" || text === "–") return null;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
}
function compare(one, other) {
  if (typeof one === typeof other) return typeof one === "number" ? one - other : one.localeCompare(other, "en", { numeric: true });
  return typeof one === "number" ? -1 : 1;
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
      rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : down ? compare(a, b) : compare(b, a)));
      body.append(...rows.map(([, row]) => row));
    });
  });
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "Filter: words, or k=50 pruned";
  input.setAttribute("aria-label", "Filter the rows");
  const count = document.createElement("span");
  count.className = "count";
  const bar = document.createElement("p");
  bar.className = "filter";
  bar.append(input, count);
  table.closest(".scroll").before(bar);
  const texts = new Map([...body.rows].map((row) => [row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase()]));
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of texts) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${texts.size} rows`;
  };
  input.addEventListener("input", filter);
  filter();
}
