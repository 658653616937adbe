"use strict";

// Plots and tables. Text from files is set as text, never as markup; what goes to Plotly was escaped where it was made.
zpipe.figures = (() => {
  // Told apart on white and on black, and by people who see few colours; the marks differ as well.
  const COLOURS = ["#2f7ed8", "#e0662b", "#2a9d6e", "#b25bc4", "#c58a12", "#d6456f", "#1b9fb3", "#8a7560"];
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "star", "cross", "triangle-down"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const described = new Map(); // plot's element -> its figure
  const drawn = new Set();
  const tables = new Map(); // a table's name, which may be anything -> its element's id

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

  function figure(told) {
    // A group, not an image: what is within an image is hidden from screen readers, and the plot's buttons can be focused.
    const label = `${told.title}. Its numbers are in a table below.`;
    const plot = make("div", { class: "plot", role: "group", "aria-label": label, "aria-details": tableId(told.table) });
    const caption = make("figcaption", {}, make("h3", {}, told.title), told.note ? make("p", {}, told.note) : null);
    described.set(plot, told);
    watch.observe(plot);
    return make("figure", { class: "figure", id: `figure-${told.id}` }, caption, plot);
  }

  function draw(plot) {
    const told = described.get(plot);
    Plotly.react(plot, traces(told), layout(told), CONFIG);
    drawn.add(plot);
  }

  // A plot takes a tenth of a second: it is drawn when it comes near, and the page is there at once.
  const watch = new IntersectionObserver(
    (seen) => {
      for (const { target } of seen.filter((one) => one.isIntersecting)) {
        watch.unobserve(target);
        draw(target);
      }
    },
    { rootMargin: "600px" },
  );
  addEventListener("beforeprint", () => described.forEach((_, plot) => draw(plot)));

  const NUMBER = /^[-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?(?= |$)/i; // of a cell; an interval or a unit may follow
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

  /** Put a table's rows in the order of a column. Equal ones stay as they are; cells without a figure come last either way. */
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
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort"); // only one column says it is sorted
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      sortRows(head.closest("table").tBodies[0], column, falling);
    });
    return head;
  }

  function table(told) {
    const caption = make("caption", {}, told.caption, told.note ? make("span", {}, told.note) : null);
    const head = make("tr", {}, ...told.columns.map(header));
    const rows = told.rows.map((row) =>
      make("tr", {}, ...row.map((text, i) => (i === 0 ? make("th", { scope: "row" }, text) : make("td", {}, text)))),
    );
    const whole = make("table", { id: tableId(told.id) }, caption, make("thead", {}, head), make("tbody", {}, ...rows));
    // Wide tables scroll; what scrolls must be reachable by keyboard.
    return make("div", { class: "table", tabindex: "0", role: "region", "aria-label": told.caption }, whole);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  return { make, figure, table };
})();
