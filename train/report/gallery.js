"use strict";

// The gallery. Only the entries near the viewport are in the document.
zpipe.gallery = (() => {
  const { make } = zpipe.figures;
  const { decodeScores, decodeBytes, tokenIds, tokenBoxes, tokenCount } = zpipe.patches;

  const MARGIN = 3; // entries beyond either end of the viewport
  const GAP = 12; // pixels between entries
  const MAX_IMAGES = 128; // that stay decoded
  const EASY = 0.5;
  const MIN_ALPHA = 1e-4; // the slider's first step above 0
  const STEPS = 1000;
  const FINE = "#ff5a36";
  const BOX = "#2fbf5b";
  const HEAT = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

  let data = null;
  const state = { left: 0, right: 0, patches: null, mode: "alpha", alpha: 0.1, budget: 1 };
  let order = []; // the indices in data.entries of the entries that match
  let active = 0; // index in `order` of the entry that Tab reaches
  let rowHeight = 0;
  let list = null;
  let status = null;
  let opened = null; // index in `order` of the enlarged entry
  const cards = new Map(); // index in `order` -> article
  const drawings = new WeakMap(); // canvas -> its content, for redrawing and for tests
  const images = new Map();
  const zoomControls = [];

  // -- data ------------------------------------------------------------------------------------------------------------

  const className = (label) => data.classes[label] || String(label);
  const isRight = (entry, model) => entry.top[model][0][0] === entry.label;

  function scoresOf(entry, model) {
    const { scores } = data.models[model].zoom;
    entry.decoded ??= [];
    entry.decoded[scores] ??= decodeScores(entry.scores[scores]);
    return entry.decoded[scores];
  }

  const currentZoom = () => (state.mode === "alpha" ? { alpha: state.alpha } : { budget: state.budget });

  /** The patches of an entry under the current zoom: {tokens, boxes}, boxes in pixels of the model's image. */
  function patchesOf(entry) {
    const { zoom, pixels } = data.models[state.patches];
    const boxes = tokenBoxes(tokenIds(scoresOf(entry, state.patches), zoom.factor, currentZoom()), zoom.side, pixels);
    return { boxes, tokens: zoom.fixed_tokens ?? boxes.length };
  }

  function meanTokens() {
    const { zoom } = data.models[state.patches];
    if (zoom.fixed_tokens !== null) return zoom.fixed_tokens;
    const count = (place) => tokenCount(scoresOf(data.entries[place], state.patches), zoom.factor, currentZoom());
    return order.reduce((sum, place) => sum + count(place), 0) / Math.max(order.length, 1);
  }

  function image(place, view) {
    const name = `${place} ${view}`;
    const found = images.get(name);
    if (found) {
      images.delete(name); // a Map iterates in the order of insertion: the image used last goes last
      images.set(name, found);
      return found;
    }
    const made = new Image();
    made.src = `data:image/jpeg;base64,${data.entries[place].views[view].jpeg}`;
    const ready = made.decode().then(() => made);
    images.set(name, ready);
    if (images.size > MAX_IMAGES) images.delete(images.keys().next().value);
    return ready;
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  const table = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (HEAT.length - 1);
    const low = Math.min(Math.floor(at), HEAT.length - 2);
    return HEAT[low].map((value, channel) => Math.round(value + (at - low) * (HEAT[low + 1][channel] - value)));
  });

  /** A map as a small picture, from 0 to its own highest value. */
  function heat(values, width) {
    const small = document.createElement("canvas");
    small.width = width;
    small.height = values.length / width;
    const top = values.reduce((most, value) => Math.max(most, value), 0) || 1;
    const pixels = new ImageData(small.width, small.height);
    values.forEach((value, i) => {
      const level = Math.max(value, 0) / top;
      // Low values are more transparent, so that the image stays visible.
      pixels.data.set([...table[Math.round(255 * level)], Math.round(255 * (0.45 + 0.4 * level))], 4 * i);
    });
    small.getContext("2d").putImageData(pixels, 0, 0);
    return small;
  }

  function outline(context, [left, top, right, bottom], scale, ink, width) {
    context.strokeStyle = ink;
    context.lineWidth = width;
    context.strokeRect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
  }

  const PAINT = {
    image(context, size, entry, view) {
      if (entry.views[view].box) {
        outline(context, entry.views[view].box, size, "rgba(0, 0, 0, 0.7)", size / 45);
        outline(context, entry.views[view].box, size, BOX, size / 90);
      }
    },
    map(context, size, entry, view) {
      paintHeat(context, size, heat(decodeBytes(entry.views[view].map), data.map_grid[1]));
    },
    scores(context, size, entry) {
      const scores = scoresOf(entry, state.patches);
      paintHeat(context, size, heat(scores, Math.sqrt(scores.length)));
    },
    patches(context, size, entry) {
      const { pixels } = data.models[state.patches];
      const { boxes, tokens } = patchesOf(entry);
      const largest = pixels / data.models[state.patches].zoom.side;
      const scale = size / pixels;
      const fine = boxes.filter(([left, , right]) => right - left < largest);
      const coarse = boxes.filter(([left, , right]) => right - left >= largest);
      context.fillStyle = "rgba(12, 16, 28, 0.45)";
      for (const [left, top, right, bottom] of coarse) {
        context.fillRect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
      }
      for (const box of coarse) outline(context, box, scale, "rgba(255, 255, 255, 0.45)", size / 300);
      for (const box of fine) outline(context, box, scale, FINE, size / 160);
      return { boxes, tokens };
    },
  };

  function paintHeat(context, size, small) {
    context.imageSmoothingEnabled = true;
    context.drawImage(small, 0, 0, size, size);
  }

  async function paint(canvas) {
    const { kind, place } = drawings.get(canvas);
    const entry = data.entries[place];
    const model = kind === "image" || kind === "map" ? state.left : state.patches;
    const { view } = data.models[model];
    const picture = await image(place, view);
    const size = Math.round(canvas.clientWidth * devicePixelRatio);
    if (!canvas.isConnected || !size) return;
    if (canvas.width !== size) canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    // Small images are shown pixel by pixel.
    context.imageSmoothingEnabled = picture.width > 96;
    context.drawImage(picture, 0, 0, size, size);
    const shown = PAINT[kind](context, size, entry, view);
    if (!shown) return;
    const fine = (shown.boxes.length - data.models[state.patches].zoom.side ** 2) / 3;
    drawings.set(canvas, { kind, place, ...shown });
    canvas.setAttribute("aria-label", `Patches: ${shown.tokens} tokens, ${fine} cells zoomed.`);
    canvas.parentNode.querySelector("figcaption").textContent = `patches: ${shown.tokens} tokens`;
  }

  // -- an entry --------------------------------------------------------------------------------------------------------

  function kindsOfPanels() {
    const kinds = [["image", "image", "The image, with the object's box where it is known."]];
    if (data.map_grid) kinds.push(["map", "teacher's map", data.map_caption]);
    if (state.patches !== null) {
      const { source, scores_caption: caption } = data.models[state.patches].zoom;
      const title = source === "zoomer" ? "Zoomer's map" : `scores: ${source}`;
      kinds.push(["scores", title, caption], ["patches", "patches", "Patches."]);
    }
    return kinds;
  }

  function panels(place) {
    const kinds = kindsOfPanels();
    const holder = make("div", { class: "panels", style: `--panels: ${kinds.length}` });
    for (const [kind, title, label] of kinds) {
      const canvas = make("canvas", { role: "img", "aria-label": label, width: 1, height: 1 });
      drawings.set(canvas, { kind, place });
      holder.append(make("figure", {}, canvas, make("figcaption", {}, title)));
    }
    return holder;
  }

  function answer(entry, model) {
    const right = isRight(entry, model);
    const rows = entry.top[model].map(([label, share]) => {
      const bar = make("span", { class: "bar" });
      bar.style.width = `${100 * share}%`;
      const truth = label === entry.label;
      return make(
        "li",
        { class: truth ? "true" : "" },
        bar,
        make("span", { class: "class" }, className(label), truth ? make("span", { class: "hidden" }, " (true class)") : null),
        make("span", { class: "share" }, `${(100 * share).toFixed(1)} %`),
      );
    });
    const kind = entry.kinds?.[model];
    const [zoom] = Object.entries(data.models[model].zoom?.chosen ?? {});
    const at = zoom ? make("span", { class: "at" }, `${zoom[0]} ${zoom[1]} `) : null;
    const head = make("h4", {}, data.models[model].name, " ", at);
    head.append(make("span", { class: right ? "right" : "wrong" }, right ? "✓ right" : "✗ wrong"));
    // The study of errors ran at another zoom, at which the answer may have been another.
    if (kind && kind !== "right" && !right) head.append(` (${kind})`);
    return make("section", { class: "answer" }, head, make("ol", {}, ...rows));
  }

  function shownModels() {
    return state.left === state.right ? [state.left] : [state.left, state.right];
  }

  function body(place) {
    const answers = shownModels().map((model) => answer(data.entries[place], model));
    return make("div", { class: "body" }, panels(place), make("div", { class: "answers" }, ...answers));
  }

  const ease = (entry) => (entry.ease === null ? "" : `${entry.ease >= EASY ? "easy" : "hard"} (${(100 * entry.ease).toFixed(0)} %)`);

  function summary(entry) {
    const answers = shownModels().map((model) => {
      const [label, share] = entry.top[model][0];
      return `${data.models[model].name}: ${className(label)}, ${(100 * share).toFixed(0)} %, ${isRight(entry, model) ? "right" : "wrong"}`;
    });
    return `${className(entry.label)}, ${entry.key}. ${answers.join(". ")}.`;
  }

  function card(at) {
    const place = order[at];
    const entry = data.entries[place];
    const head = make(
      "header",
      {},
      make("h3", {}, make("span", {}, "class "), className(entry.label)),
      make("span", { class: "key", title: entry.key }, entry.key),
      make("span", { class: "ease" }, ease(entry)),
    );
    const article = make("article", {
      class: "entry",
      tabindex: at === active ? "0" : "-1",
      "aria-posinset": at + 1,
      "aria-setsize": order.length,
      "aria-label": summary(entry),
    });
    article.dataset.at = at;
    article.append(head, body(place));
    article.style.top = `${at * rowHeight}px`;
    return article;
  }

  // -- the list --------------------------------------------------------------------------------------------------------

  function clear() {
    for (const article of cards.values()) article.remove();
    cards.clear();
  }

  function measure() {
    clear();
    if (!order.length) return;
    const probe = card(0);
    list.append(probe);
    rowHeight = probe.offsetHeight + GAP;
    probe.remove();
    list.style.height = `${order.length * rowHeight - GAP}px`;
  }

  /** Keep only the entries near the viewport and the active one, which may have focus, in the document. */
  function update() {
    if (!order.length) return;
    const above = -list.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(above / rowHeight) - MARGIN);
    const last = Math.min(order.length - 1, Math.floor((above + innerHeight) / rowHeight) + MARGIN);
    for (const [at, article] of cards) {
      if ((at < first || at > last) && at !== active) {
        article.remove();
        cards.delete(at);
      }
    }
    for (let at = first; at <= last; at += 1) ensure(at);
    ensure(active);
  }

  function ensure(at) {
    if (cards.has(at)) return cards.get(at);
    const article = card(at);
    // In the order of the list, because screen readers follow the document.
    const next = [...cards.keys()].filter((other) => other > at).sort((a, b) => a - b)[0];
    list.insertBefore(article, next === undefined ? null : cards.get(next));
    cards.set(at, article);
    article.querySelectorAll("canvas").forEach(paint);
    return article;
  }

  function activate(at, focus) {
    const target = Math.max(0, Math.min(order.length - 1, at));
    cards.get(active)?.setAttribute("tabindex", "-1");
    active = target;
    const article = ensure(target);
    article.setAttribute("tabindex", "0");
    if (focus) {
      article.scrollIntoView({ block: "nearest" });
      article.focus({ preventScroll: true });
    }
    update();
  }

  function matches(entry) {
    const chosen = (name) => document.getElementById(`filter-${name}`)?.value || "";
    const [left, right] = [isRight(entry, state.left), isRight(entry, state.right)];
    const outcomes = {
      "left-right": left,
      "left-wrong": !left,
      "right-right": right,
      "right-wrong": !right,
      both: left && right,
      neither: !left && !right,
      "only-left": left && !right,
      "only-right": right && !left,
    };
    if (chosen("class") !== "" && String(entry.label) !== chosen("class")) return false;
    if (chosen("outcome") && !outcomes[chosen("outcome")]) return false;
    if (chosen("ease") && (entry.ease === null || entry.ease >= EASY !== (chosen("ease") === "easy"))) return false;
    if (chosen("kind") && !shownModels().some((model) => entry.kinds?.[model] === chosen("kind"))) return false;
    return true;
  }

  function refilter() {
    order = [...data.entries.keys()].filter((place) => matches(data.entries[place]));
    const sorted = document.getElementById("filter-order").value;
    const by = (place) => data.entries[place].ease ?? 0;
    if (sorted === "hard") order.sort((a, b) => by(a) - by(b) || a - b);
    if (sorted === "easy") order.sort((a, b) => by(b) - by(a) || a - b);
    active = 0;
    rebuild();
  }

  function rebuild() {
    const focused = list.contains(document.activeElement); // its element is removed below
    measure();
    const none = document.getElementById("no-match");
    none.hidden = order.length > 0;
    if (!order.length) list.style.height = "0";
    update();
    if (focused) cards.get(active)?.focus({ preventScroll: true });
    showStatus();
  }

  function showStatus() {
    status.textContent = `${order.length} of ${data.entries.length} images match.`;
    showTokens();
  }

  function showTokens() {
    if (state.patches === null) return;
    const text = order.length ? `${meanTokens().toFixed(1)} tokens per image, mean of the ${order.length} that match` : "";
    for (const control of zoomControls) control.tokens.textContent = text;
  }

  // -- the zoom --------------------------------------------------------------------------------------------------------

  /** The slider is logarithmic, because useful thresholds are small; its first step is 0. */
  function alphaAt(step) {
    if (step <= 0) return 0;
    return Number((MIN_ALPHA ** (1 - (step - 1) / (STEPS - 1))).toPrecision(3));
  }

  function stepOf(alpha) {
    if (alpha < MIN_ALPHA) return 0;
    return Math.round(1 + (STEPS - 1) * (1 - Math.log(alpha) / Math.log(MIN_ALPHA)));
  }

  function zoomControl(name) {
    const radio = (mode, label) => {
      const input = make("input", { type: "radio", name: `mode-${name}`, value: mode });
      input.addEventListener("change", () => setZoom({ mode }));
      return [input, make("label", {}, input, label)];
    };
    const [alphaRadio, alphaLabel] = radio("alpha", "threshold α");
    const [budgetRadio, budgetLabel] = radio("budget", "budget of cells");
    const slider = make("input", { type: "range", "aria-label": "zoom" });
    const number = make("input", { type: "number", "aria-label": "zoom, as a number" });
    const marks = make("datalist", { id: `marks-${name}` });
    slider.setAttribute("list", marks.id);
    const tokens = make("output", { "aria-live": "off" }); // screen readers speak the value of the slider
    slider.addEventListener("input", () => {
      setZoom(state.mode === "alpha" ? { alpha: alphaAt(Number(slider.value)) } : { budget: Number(slider.value) }, number);
    });
    number.addEventListener("input", () => {
      if (number.value === "" || !number.checkValidity()) return;
      setZoom({ [state.mode]: Number(number.value) }, number);
    });
    number.addEventListener("change", () => setZoom({}));
    const control = {
      tokens,
      sync(typing) {
        const { side, evaluated } = data.models[state.patches].zoom;
        alphaRadio.checked = state.mode === "alpha";
        budgetRadio.checked = state.mode === "budget";
        const byAlpha = state.mode === "alpha";
        Object.assign(slider, { min: 0, max: byAlpha ? STEPS : side ** 2, step: 1 });
        Object.assign(number, { min: 0, max: byAlpha ? 1 : side ** 2, step: byAlpha ? "any" : 1 });
        const ticks = evaluated.filter((zoom) => Number.isFinite(zoom[state.mode])).map((zoom) => zoom[state.mode]);
        marks.replaceChildren(...ticks.map((at) => make("option", { value: byAlpha ? stepOf(at) : at })));
        slider.value = byAlpha ? stepOf(state.alpha) : state.budget;
        slider.setAttribute("aria-valuetext", byAlpha ? `alpha ${state.alpha}` : `${state.budget} cells`);
        if (typing !== number || document.activeElement !== number) number.value = byAlpha ? state.alpha : state.budget;
      },
    };
    zoomControls.push(control);
    return make("fieldset", { class: "zoom" }, make("legend", {}, "Zoom"), alphaLabel, budgetLabel, slider, marks, number, tokens);
  }

  let redraw = 0;

  function setZoom(change, typing) {
    Object.assign(state, change);
    const cells = data.models[state.patches].zoom.side ** 2;
    state.budget = Math.max(0, Math.min(cells, Math.round(state.budget)));
    for (const control of zoomControls) control.sync(typing);
    cancelAnimationFrame(redraw);
    redraw = requestAnimationFrame(() => {
      document.querySelectorAll("#gallery canvas, #enlarged canvas").forEach((canvas) => {
        if (drawings.get(canvas)?.kind === "patches") paint(canvas);
      });
      showTokens();
    });
  }

  function startZoom(model) {
    const { chosen } = data.models[model].zoom;
    state.mode = "budget" in chosen ? "budget" : "alpha";
    if ("budget" in chosen) state.budget = chosen.budget;
    else state.alpha = chosen.alpha;
  }

  // -- filters ---------------------------------------------------------------------------------------------------------

  function select(id, label, options, onChange, chosen) {
    const menu = make("select", { id }, ...options.map(([value, text]) => make("option", { value }, text)));
    if (chosen !== undefined) menu.value = chosen;
    menu.addEventListener("change", () => onChange(menu.value));
    return make("div", { class: "field" }, make("label", { for: id }, label), menu);
  }

  function filters() {
    const names = data.models.map((model, number) => [String(number), model.name]);
    const present = [...new Set(data.entries.map((entry) => entry.label))].sort((a, b) => a - b);
    const kinds = [...new Set(data.entries.flatMap((entry) => Object.values(entry.kinds ?? {})))].sort();
    const pick = (side) => (value) => {
      state[side] = Number(value);
      refilter();
    };
    const row = make("div", { class: "row" }, select("left-model", "Model A", names, pick("left"), String(state.left)));
    if (names.length > 1) row.append(select("right-model", "Model B", names, pick("right"), String(state.right)));
    const zooming = names.filter((_, number) => data.models[number].zoom);
    if (zooming.length > 1) {
      row.append(
        select("patch-model", "Patches of", zooming, (value) => {
          state.patches = Number(value);
          setZoom({});
          rebuild();
        }, String(state.patches)),
      );
    }
    const classes = present.map((label) => [String(label), className(label)]);
    row.append(select("filter-class", "Class", [["", "all"], ...classes], refilter));
    const single = [["", "all"], ["left-right", "A right"], ["left-wrong", "A wrong"]];
    const double = [["right-right", "B right"], ["right-wrong", "B wrong"], ["both", "both right"], ["neither", "both wrong"], ["only-left", "only A right"], ["only-right", "only B right"]];
    row.append(select("filter-outcome", "Right or wrong", names.length > 1 ? [...single, ...double] : single, refilter));
    row.append(select("filter-ease", "Difficulty", [["", "all"], ["easy", "easy"], ["hard", "hard"]], refilter));
    if (kinds.length) row.append(select("filter-kind", "Error kind", [["", "all"], ...kinds.map((kind) => [kind, kind])], refilter));
    row.append(select("filter-order", "Order", [["", "as drawn"], ["hard", "hardest first"], ["easy", "easiest first"]], refilter));
    row.append(make("button", { type: "button", id: "reset" }, "Reset filters"));
    row.lastChild.addEventListener("click", () => {
      for (const menu of document.querySelectorAll("[id^='filter-']")) menu.value = "";
      refilter();
    });
    return row;
  }

  // -- the enlarged view -----------------------------------------------------------------------------------------------

  function buildDialog() {
    const dialog = document.getElementById("enlarged");
    const button = (id, label, action) => {
      const made = make("button", { type: "button", id }, label);
      made.addEventListener("click", action);
      return made;
    };
    const buttons = make(
      "div",
      { class: "buttons" },
      button("before", "← Previous", () => enlarge(opened - 1)),
      button("after", "Next →", () => enlarge(opened + 1)),
      button("close", "Close", () => dialog.close()),
    );
    const head = make("div", { class: "enlarged-head" }, make("h2", { id: "enlarged-title" }), make("span", { class: "key" }), buttons);
    dialog.append(head, ...(state.patches === null ? [] : [zoomControl("enlarged")]), make("div", { id: "enlarged-body" }));
    dialog.addEventListener("keydown", (event) => {
      if (event.target.matches("input, select")) return; // arrow keys change their values
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      enlarge(opened + step);
    });
    dialog.addEventListener("close", () => activate(opened, true));
  }

  function enlarge(at) {
    if (at < 0 || at >= order.length) return;
    opened = at;
    const dialog = document.getElementById("enlarged");
    const entry = data.entries[order[at]];
    dialog.querySelector("h2").replaceChildren(make("span", {}, "class "), className(entry.label));
    dialog.querySelector(".key").textContent = [entry.key, ease(entry), `${at + 1} of ${order.length}`].filter(Boolean).join(" · ");
    // Not `disabled`, because a disabled button loses the focus, and with it the arrow keys.
    document.getElementById("before").setAttribute("aria-disabled", at === 0);
    document.getElementById("after").setAttribute("aria-disabled", at === order.length - 1);
    document.getElementById("enlarged-body").replaceChildren(body(order[at]));
    if (!dialog.open) {
      dialog.showModal();
      document.getElementById("close").focus();
    }
    dialog.querySelectorAll("canvas").forEach(paint);
  }

  // -- start -----------------------------------------------------------------------------------------------------------

  function onKey(event) {
    const article = event.target.closest(".entry");
    if (!article || event.target !== article || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = Number(article.dataset.at);
    const page = Math.max(1, Math.floor(innerHeight / rowHeight) - 1);
    const moves = {
      ArrowUp: at - 1,
      ArrowLeft: at - 1,
      ArrowDown: at + 1,
      ArrowRight: at + 1,
      PageUp: at - page,
      PageDown: at + page,
      Home: 0,
      End: order.length - 1,
    };
    if (event.key === "Enter") enlarge(at);
    else if (event.key in moves) activate(moves[event.key], true);
    else return;
    event.preventDefault();
  }

  function about() {
    const { entries, total, shards, shards_read: read, shard_count: all, seed, difficulty, settings } = data;
    const drawn = entries.length === total ? `All ${total} images` : `${entries.length} of ${total} images`;
    return [
      `${drawn} of ${shards}, drawn with seed ${seed} from ${read} of its ${all} shards.`,
      `Easy: ${difficulty} is at least ${100 * EASY} %; hard: it is less.`,
      ...settings,
      state.patches === null ? "" : "The slider redraws the patches, not the answers.",
      "Arrow keys go from entry to entry, Enter enlarges, Esc closes.",
    ].filter(Boolean).join(" ");
  }

  function legend() {
    const item = (kind, label) => make("span", {}, make("i", { class: kind }), label);
    const items = [item("heat", "maps: 0 to the highest value in the image")];
    if (data.entries.some((entry) => entry.views.some((view) => view.box))) items.push(item("box", "object's box"));
    if (state.patches !== null) items.push(item("fine", "small patch"), item("coarse", "large patch"));
    return make("p", { class: "legend" }, ...items);
  }

  function start(found) {
    data = found;
    const holder = document.getElementById("gallery-body");
    if (!data) {
      document.getElementById("gallery-about").textContent = "No gallery in this report.";
      document.documentElement.dataset.ready = "true";
      return;
    }
    const zooming = data.models.findIndex((model) => model.zoom);
    state.patches = zooming < 0 ? null : zooming;
    state.left = Math.max(zooming, 0);
    state.right = data.models.findIndex((model, number) => number !== state.left && !model.zoom);
    if (state.right < 0) state.right = data.models.length > 1 ? Number(state.left === 0) : state.left;
    document.getElementById("gallery-about").textContent = about();
    status = make("p", { class: "status", role: "status", "aria-live": "polite" });
    const controls = make("div", { class: "controls", role: "group", "aria-label": "Zoom and filters" }, filters());
    if (state.patches !== null) {
      startZoom(state.patches);
      controls.prepend(zoomControl("list"));
    }
    controls.lastChild.append(status);
    list = make("div", { class: "entries", role: "feed", "aria-label": "Images" });
    holder.append(legend(), controls, make("p", { id: "no-match", class: "none", hidden: true }, "No image matches these filters."), list);
    buildDialog();
    for (const control of zoomControls) control.sync();
    list.addEventListener("keydown", onKey);
    list.addEventListener("click", (event) => {
      const article = event.target.closest(".entry");
      if (article && event.target.closest(".panels") && !getSelection().toString()) enlarge(Number(article.dataset.at));
      else if (article) activate(Number(article.dataset.at), false);
    });
    refilter();
    let waiting = 0;
    const soon = (action) => () => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(action);
    };
    addEventListener("scroll", soon(update), { passive: true });
    addEventListener("resize", soon(rebuild));
    document.documentElement.dataset.ready = "true";
  }

  /** The patches that an entry shows, for tests: {tokens, boxes}. */
  function shownPatches(article) {
    const canvas = [...article.querySelectorAll("canvas")].find((one) => drawings.get(one).kind === "patches");
    return drawings.get(canvas);
  }

  return { start, shownPatches };
})();
