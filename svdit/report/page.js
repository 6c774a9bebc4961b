"use strict";
const one = (query, root = document) => root.querySelector(query);
const all = (query, root = document) => [...root.querySelectorAll(query)];

/** An element with a class and children; strings become text, never markup. */
function make(name, className = "", ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/* The table of layers: a heading sorts, first up, then down; text, model and kind filter. */
function sortable(table) {
  const body = one("tbody", table);
  const headings = all("thead th", table);
  const collator = new Intl.Collator("en", { numeric: true });
  headings.forEach((heading, column) => one("button", heading).addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.v;
    const text = row => row.cells[column].textContent;
    const numeric = [...body.rows].some(row => key(row) !== undefined);
    const compare = (a, b) => numeric ? Number(key(a)) - Number(key(b)) : collator.compare(text(a), text(b));
    const known = row => !numeric || key(row) !== undefined;
    const rows = [...body.rows].sort((a, b) => known(b) - known(a) || (known(a) ? (down ? -1 : 1) * compare(a, b) : 0));
    body.append(...rows);
  }));
}

function filterable(table) {
  const inputs = ["text", "model", "kind"].map(name => one(`#layer-${name}`));
  const count = one("#layer-count");
  const rows = all("tbody tr", table);
  const apply = () => {
    const [text, model, kind] = inputs.map(input => input ? input.value : "");
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      const fits = words.every(word => content.includes(word)) && (!model || row.dataset.model === model)
        && (!kind || row.dataset.kind === kind);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = shown === rows.length ? `${shown} layers` : `${shown} of ${rows.length} layers`;
  };
  for (const input of inputs) if (input) input.addEventListener("input", apply);
}

/* The images; at first FIRST of them. */
const FIRST = 24;

function picture(src, alt) {
  const image = make("img");
  image.src = src;
  image.alt = alt;
  return image;
}

const decibels = psnr => psnr === null ? "" : psnr === "identical" ? "identical" : `${psnr.toFixed(1)} dB`;
const quality = row => Math.min(...row.psnr.map(psnr => psnr === null ? Infinity : psnr === "identical" ? 1e9 : psnr));
const caption = row => row.label === null ? row.name : `${row.name}, class ${row.label}`;

function column(row, columns, i) {
  const name = columns[i + 1];
  const what = `${caption(row)}, ${name}, ${decibels(row.psnr[i])}`;
  const wiped = make("span", "wiped", picture(row.src[i + 1], what), picture(row.src[0], ""));
  const open = make("button", "open", wiped);
  open.type = "button";
  open.setAttribute("aria-label", `Enlarge ${what}`);
  open.addEventListener("click", () => enlarge(row, columns, i, open.closest(".gallery")));
  const base = picture(row.src[0], `difference of ${name} to full precision`);
  const difference = make("span", "difference", base, picture(row.src[i + 1], ""));
  const label = make("span", "text", name);
  label.title = name;
  return make("div", "", open, label, make("span", "text db", decibels(row.psnr[i])), difference);
}

function still(row, columns, gain) {
  const image = make("span", "still", picture(row.src[0], `${caption(row)}, full precision`));
  const label = make("span", "text times", "difference × ", make("b", "", gain));
  return make("div", "", image, make("span", "text", "full precision"), make("span", "text db", columns[0]), label);
}

function tile(row, columns, gain) {
  const cells = make("div", "cells", still(row, columns, gain), ...row.psnr.map((_, i) => column(row, columns, i)));
  const figure = make("figure", "tile", make("figcaption", "", caption(row)), cells);
  figure.dataset.label = row.label;
  return figure;
}

function wipe(element, value) {
  element.style.setProperty("--wipe", `${value}%`);
  element.style.setProperty("--edge", value > 0 && value < 100 ? 1 : 0);
}

/** A window with one image in full precision, quantized, and their difference, and a slider of its own. */
function enlarge(row, columns, i, gallery) {
  const dialog = make("dialog", one(".small", gallery) ? "small" : "");
  const close = make("button", "", "Close");
  close.type = "button";
  close.addEventListener("click", () => dialog.close());
  const slider = make("input", "wipe");
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  slider.addEventListener("input", () => wipe(dialog, slider.value));
  const wiped = make("span", "wiped", picture(row.src[i + 1], columns[i + 1]), picture(row.src[0], ""));
  const difference = make("span", "difference", picture(row.src[0], "difference"), picture(row.src[i + 1], ""));
  const gain = one(".gain", gallery).value;
  dialog.style.setProperty("--gain", gain);
  wipe(dialog, slider.value);
  const label = make("label", "", "Full precision over quantized ", slider);
  dialog.append(make("p", "", `${caption(row)}, ${columns[i + 1]}, ${decibels(row.psnr[i])}`, label, close),
    make("div", "cells", make("div", "", wiped, make("span", "text", "full precision on the left, quantized on the right")),
      make("div", "", difference, make("span", "text", `difference × ${gain}`))));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function fill(gallery, data) {
  const tiles = one(".tiles", gallery);
  tiles.classList.toggle("small", data.small);
  tiles.style.setProperty("--tile", `${Math.min(60, 5.6 * data.columns.length)}rem`);
  const figures = data.images.map(row => ({ row, figure: tile(row, data.columns, String(data.gain)) }));
  const [wiper, gain, label, order] = [".wipe", ".gain", ".class", ".order"].map(query => one(query, gallery));
  const more = one(".more", gallery);
  let shown = FIRST;
  const show = () => {
    const wanted = label ? label.value : "";
    const chosen = figures.filter(({ row }) => wanted === "" || String(row.label) === wanted);
    if (order.value === "worst") chosen.sort((a, b) => quality(a.row) - quality(b.row));
    more.hidden = chosen.length <= shown;
    more.textContent = `Show all ${chosen.length} images`;
    tiles.replaceChildren(...chosen.slice(0, shown).map(({ figure }) => figure));
  };
  more.addEventListener("click", () => { shown = Infinity; show(); });
  wiper.addEventListener("input", () => wipe(tiles, wiper.value));
  gain.addEventListener("input", () => {
    tiles.style.setProperty("--gain", gain.value);
    one("output", gain.parentElement).textContent = gain.value;
    for (const { figure } of figures) one(".times b", figure).textContent = gain.value;
  });
  tiles.style.setProperty("--gain", data.gain);
  for (const select of [label, order]) if (select) select.addEventListener("input", show);
  show();
}

/* The heat maps read out the cell under the pointer, or the one that the arrow keys choose. */
function readable(svg) {
  const { rows, times, cells } = JSON.parse(svg.dataset.heat);
  const [left, top, width, height] = JSON.parse(svg.dataset.box);
  const output = one("output", svg.parentElement);
  const cursor = one(".cursor", svg);
  let at = [0, 0];
  const show = (row, column) => {
    at = [Math.max(0, Math.min(rows.length - 1, row)), Math.max(0, Math.min(times.length - 1, column))];
    cursor.setAttribute("x", left + width * at[1] / times.length);
    cursor.setAttribute("y", top + height * at[0] / rows.length);
    const value = cells[at[0]][at[1]];
    output.textContent = `${rows[at[0]]} at ${times[at[1]]}: ${value === null ? "not computed" : `${value} %`}`;
  };
  svg.addEventListener("pointermove", event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const across = (point.x - left) / width, down = (point.y - top) / height;
    if (across >= 0 && across < 1 && down >= 0 && down < 1) show(Math.floor(down * rows.length), Math.floor(across * times.length));
  });
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  svg.addEventListener("keydown", event => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    show(at[0] + move[0], at[1] + move[1]);
  });
  svg.addEventListener("focus", () => show(...at));
}

const galleries = JSON.parse(one("#data").textContent);
all(".gallery").forEach((gallery, i) => fill(gallery, galleries[i]));
all("#layer-table").forEach(table => { sortable(table); filterable(table); });
all(".heat").forEach(readable);
