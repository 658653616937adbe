"use strict";

// Plots and tables. Text from files is set as text, never as markup; figures.py escapes the text of plots.
zpipe.figures = (() => {
  // Distinct on white and on black, and for colour-blind people; the markers differ as well.
  const COLOURS = ["#2f7ed8", "#e0662b", "#2a9d6e", "#b25bc4", "#c58a12", "#d6456f", "#1b9fb3", "#8a7560"];
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "star", "cross", "triangle-down"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const specs = new Map(); // plot's element -> its figure
  const drawn = new Set();
  const tables = new Map(); // a table's name, which may be any text -> its element's id

  /** An element with its attributes and children; strings among the children become text. */
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === false || value === null || value === undefined) continue;
      if (name === "class") node.className = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  function tableId(name) {
    if (!tables.has(name)) tables.set(name, `table-${tables.size}`);
    return tables.get(name);
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function traces({ data }) {
    return data.map(({ series, dashed, ...trace }) => {
      const ink = COLOURS[series % COLOURS.length];
      const round = Math.floor(series / COLOURS.length);
      const out = { ...trace };
      if (trace.type === "bar") out.marker = { color: ink, opacity: 0.7 };
      else {
        out.marker = { color: ink, size: 9, symbol: SYMBOLS[(series + round) % SYMBOLS.length] };
        out.line = { color: ink, width: 2, dash: dashed ? "dash" : DASHES[round % DASHES.length] };
      }
      for (const bars of ["error_x", "error_y"]) {
        if (trace[bars]) out[bars] = { ...trace[bars], color: ink, thickness: 1.2, width: 4 };
      }
      return out;
    });
  }

  function layout(plotted) {
    const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
    const titled = (own) => ({ ...axis, ...own, title: { ...own.title, font: { size: 13 }, standoff: 10 } });
    const few = plotted.data.length <= 8;
    return {
      ...plotted.layout,
      xaxis: titled(plotted.layout.xaxis),
      yaxis: titled(plotted.layout.yaxis),
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 13 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--quiet"), font: { color: colour("--text") }, align: "left" },
      hovermode: "closest",
      margin: { l: 60, r: 16, t: 16, b: 48 },
      height: few ? 380 : 380 + 10 * plotted.data.length,
      showlegend: true,
      legend: { orientation: "h", y: -0.18, yanchor: "top", x: 0 },
    };
  }

  function figure(spec) {
    // A group, not an image: screen readers skip the content of an image, and the plot has buttons.
    const label = `${spec.title}. Its numbers are in a table below.`;
    const plot = make("div", { class: "plot", role: "group", "aria-label": label, "aria-details": tableId(spec.table) });
    const caption = make("figcaption", {}, make("h3", {}, spec.title), spec.note ? make("p", {}, spec.note) : null);
    specs.set(plot, spec);
    watch.observe(plot);
    return make("figure", { class: "figure", id: `figure-${spec.id}` }, caption, plot);
  }

  function draw(plot) {
    const spec = specs.get(plot);
    Plotly.react(plot, traces(spec), layout(spec), CONFIG);
    drawn.add(plot);
  }

  // Drawing a plot takes a tenth of a second, so plots are drawn when they come near the viewport.
  const watch = new IntersectionObserver(
    (entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        watch.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "600px" },
  );
  addEventListener("beforeprint", () => specs.forEach((_, plot) => draw(plot)));

  const NUMBER = /^[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?(?= |$)/i; // at the start of a cell, before an interval or a unit
  const PARTS = /(\d+(?:\.\d+)?(?:e[-+]?\d+)?)/i; // "alpha 0.05" comes before "alpha 0.1", "seed-2" before "seed-10"
  const letters = new Intl.Collator("en");

  const number = (text) => Number(NUMBER.exec(text)[0].replaceAll(",", ""));

  function compareTexts(one, other) {
    const [mine, theirs] = [one.split(PARTS), other.split(PARTS)];
    for (let i = 0; i < Math.min(mine.length, theirs.length); i += 1) {
      const apart = i % 2 ? Number(mine[i]) - Number(theirs[i]) : letters.compare(mine[i], theirs[i]);
      if (apart) return apart;
    }
    return mine.length - theirs.length;
  }

  /** Sort a table's rows by a column. Equal rows keep their order; empty cells come last in both directions. */
  function sortRows(body, column, falling) {
    const text = (row) => row.cells[column].textContent;
    const [empty, full] = [[], []];
    for (const row of body.rows) (text(row) === "" ? empty : full).push(row);
    const numeric = full.every((row) => NUMBER.test(text(row)));
    const compare = numeric ? (a, b) => number(text(a)) - number(text(b)) : (a, b) => compareTexts(text(a), text(b));
    full.sort(falling ? (a, b) => compare(b, a) : compare);
    body.append(...full, ...empty);
  }

  function header(name, column) {
    const button = make("button", { type: "button", title: `Sort by ${name}` }, name, make("span", { "aria-hidden": "true" }));
    const head = make("th", { scope: "col" }, button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort"); // only one column is marked as sorted
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      sortRows(head.closest("table").tBodies[0], column, falling);
    });
    return head;
  }

  function table(spec) {
    const caption = make("caption", {}, spec.caption, spec.note ? make("span", {}, spec.note) : null);
    const head = make("tr", {}, ...spec.columns.map(header));
    const rows = spec.rows.map((row) =>
      make("tr", {}, ...row.map((text, i) => (i === 0 ? make("th", { scope: "row" }, text) : make("td", {}, text)))),
    );
    const whole = make("table", { id: tableId(spec.id) }, caption, make("thead", {}, head), make("tbody", {}, ...rows));
    // Wide tables scroll, so they must be reachable by keyboard.
    return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": spec.caption }, whole);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  return { make, figure, table };
})();
