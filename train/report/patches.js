"use strict";

const zpipe = {};

// The rules of zoom_tokens.py (section 3.3 of the paper) for one image: which cells are zoomed, which tokens result, and
// which pixels they cover. Scores are float32, so the threshold is rounded to float32 before the comparison.
zpipe.patches = (() => {
  /** base64 of little-endian float32 -> Float32Array. */
  function decodeScores(text) {
    const bytes = decodeBytes(text);
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  }

  /** base64 -> Uint8Array. */
  function decodeBytes(text) {
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  }

  /** The score of every coarse cell: its own at zoom factor 2, the highest of its 2 x 2 block at 0.5. */
  function coarseScores(scores, factor) {
    if (factor === 2) return scores;
    const side = Math.sqrt(scores.length);
    const half = side / 2;
    return Float32Array.from({ length: half * half }, (_, cell) => {
      const first = 2 * Math.floor(cell / half) * side + 2 * (cell % half);
      return Math.max(scores[first], scores[first + 1], scores[first + side], scores[first + side + 1]);
    });
  }

  /** The score of every fine cell: that of the score cell it lies in. */
  function fineScores(scores, factor) {
    if (factor !== 2) return scores;
    const side = Math.sqrt(scores.length);
    return Float32Array.from({ length: 4 * scores.length }, (_, cell) => {
      const row = Math.floor(cell / (2 * side));
      return scores[(row >> 1) * side + ((cell % (2 * side)) >> 1)];
    });
  }

  /** The coarse cells to zoom, as an array of booleans: those strictly above the threshold, or the `budget` best ones, of
   * equal ones those of lower index. zoom: {alpha} or {budget}. */
  function zoomedCells(cells, zoom) {
    if (zoom.budget === undefined) {
      const alpha = Math.fround(zoom.alpha);
      return Array.from(cells, (score) => score > alpha);
    }
    const chosen = Array.from({ length: cells.length }, () => false);
    for (const cell of falling(cells, cells.keys()).slice(0, zoom.budget)) chosen[cell] = true;
    return chosen;
  }

  function falling(scores, indices) {
    return [...indices].sort((a, b) => scores[b] - scores[a] || a - b);
  }

  /** Token ids in the order of the sequence: fine tokens by falling score, then coarse ones. Ids 0 .. 4C-1 are the fine grid,
   * 4C .. 5C-1 the coarse grid, both row-major. */
  function tokenIds(scores, factor, zoom) {
    const cells = coarseScores(scores, factor);
    const places = fineScores(scores, factor);
    const zoomed = zoomedCells(cells, zoom);
    const side = Math.sqrt(cells.length);
    const fine = [];
    const coarse = [];
    zoomed.forEach((yes, cell) => {
      if (!yes) return coarse.push(cell);
      const first = 4 * side * Math.floor(cell / side) + 2 * (cell % side);
      return fine.push(first, first + 1, first + 2 * side, first + 2 * side + 1);
    });
    return [...falling(places, fine), ...falling(cells, coarse).map((cell) => 4 * cells.length + cell)];
  }

  /** The pixels that tokens cover, [[left, top, right, bottom], ...], right and bottom exclusive. side: coarse cells a side. */
  function tokenBoxes(ids, side, pixels) {
    const fineCells = 4 * side * side;
    return ids.map((id) => {
      const index = id >= fineCells ? id - fineCells : id;
      const own = id >= fineCells ? side : 2 * side;
      const step = Math.floor(pixels / own);
      const left = (index % own) * step;
      const top = Math.floor(index / own) * step;
      return [left, top, left + step, top + step];
    });
  }

  /** The number of tokens: C + 3 per zoomed cell. */
  function tokenCount(scores, factor, zoom) {
    const cells = coarseScores(scores, factor);
    const zoomed =
      zoom.budget === undefined ? zoomedCells(cells, zoom).filter(Boolean).length : Math.min(zoom.budget, cells.length);
    return cells.length + 3 * zoomed;
  }

  return { decodeScores, decodeBytes, coarseScores, tokenIds, tokenBoxes, tokenCount };
})();
