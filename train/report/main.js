"use strict";

(() => {
  const { make, figure, table } = zpipe.figures;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const about = read("about-data");

  const MAPS_HINT = "No test of maps. To make one: zpipe maps judge STORES SHARDS --json FILE, with FILE in a folder of this report.";

  const runs = about.runs.length ? `${about.runs.length} runs: ${about.runs.join(", ")}. ` : "";
  document.getElementById("about").textContent = `${runs}Made by zpipe ${about.zpipe}.`;

  const { tiles, comparisons, left_out: leftOut } = about.headline;
  const line = (kind, text) => (text ? make("p", { class: kind }, text) : null);
  for (const tile of tiles) {
    document.getElementById("tiles").append(
      make(
        "div",
        { class: "tile", role: "listitem" },
        line("name", tile.name),
        line("value", tile.value),
        line("interval", tile.interval),
        line("facts", tile.facts.join(" · ")),
        line("of", tile.of),
      ),
    );
  }
  if (leftOut) comparisons.push(`${leftOut} more in the table below.`);
  document.getElementById("comparisons").append(...comparisons.map((text) => make("li", {}, text)));
  if (about.notes.length) {
    const lines = about.notes.map((text) => make("li", {}, text));
    document.getElementById("notes").append(make("div", { class: "note" }, make("p", {}, "Not on this page:"), make("ul", {}, ...lines)));
  }

  for (const part of ["accuracy", "maps", "training"]) {
    const section = document.getElementById(part);
    section.querySelector(".figures").append(...about.figures[part].map(figure));
    section.querySelector(".tables").append(...about.tables[part].map(table));
    if (!about.figures[part].length && !about.tables[part].length) {
      section.append(make("p", { class: "lead" }, part === "maps" ? MAPS_HINT : "Nothing to show."));
    }
  }
  // The gallery is most of the page; the figures are shown before it is parsed.
  requestAnimationFrame(() => setTimeout(() => zpipe.gallery.start(read("gallery-data"))));
})();
