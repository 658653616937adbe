"""Finds the rows of a store by the digests of images. Pure NumPy: digests in, row numbers out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from zpipe.schemas.image_digest import DIGEST_BYTES


class Matches(NamedTuple):
    """Rows of a store for images."""

    rows: np.ndarray
    """int64 [m], the row of each image, the first one of several; -1 where there is none."""
    doubtful: list[tuple[int, np.ndarray]]
    """Images of which several rows have the digest, and none or several of them the label, and these rows; once for
    each digest and label."""


def digest_column(column: pa.ChunkedArray) -> np.ndarray:
    """The digests of a column of 16 bytes, uint8 [n, 16]."""
    chunk = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.binary(DIGEST_BYTES))
    data = np.frombuffer(chunk.buffers()[1] or b"", np.uint8)
    return data[chunk.offset * DIGEST_BYTES :][: len(chunk) * DIGEST_BYTES].reshape(-1, DIGEST_BYTES)


class DigestRows:
    """The rows of digests, sorted once: about 40 bytes each, and half a second for a million.

    Args:
        digests: uint8 [n, 16].
    """

    def __init__(self, digests: np.ndarray) -> None:
        high, low = _words(digests)
        self._order = np.argsort(high, kind="stable").astype(np.int32)  # no store has 2**31 rows in memory
        self._high = high[self._order]
        several = np.zeros(len(high), bool)
        equal = self._high[1:] == self._high[:-1]
        several[1:] |= equal
        several[:-1] |= equal
        few = self._order[several]  # sorting all of them by both halves would take three times as long
        self._order[several] = few[np.lexsort((low[few], high[few]))]  # equal digests stand in the order of their rows
        self._low = low[self._order]

    def spans(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where equal digests stand in the sorted order: begin and end of each, int32 [m]; begin = end for none.

        Args:
            digests: uint8 [m, 16].
        """
        high, low = _words(digests)
        # Sorted queries walk through memory in one direction, which is several times as fast.
        order = np.argsort(high, kind="stable").astype(np.int32)
        queries = high[order]
        begin, end = np.empty(len(high), np.int32), np.empty(len(high), np.int32)
        begin[order] = np.searchsorted(self._high, queries, "left")
        end[order] = np.searchsorted(self._high, queries, "right")
        single = np.flatnonzero(end - begin == 1)
        end[single] -= self._low[begin[single]] != low[single]
        for place in np.flatnonzero(end - begin > 1).tolist():
            first, last = np.searchsorted(self._low[begin[place] : end[place]], low[place]), end[place]
            begin[place] += first
            end[place] = begin[place] + np.searchsorted(self._low[begin[place] : last], low[place], "right")
        return begin, end

    def rows(self, digest: bytes) -> np.ndarray:
        """The rows of one digest, ascending."""
        begin, end = self.spans(np.frombuffer(digest, np.uint8).reshape(1, DIGEST_BYTES))
        return self._order[begin[0] : end[0]]

    def match(self, labels: np.ndarray, digests: np.ndarray, wanted: np.ndarray) -> Matches:
        """Find a row for each image. A data set may hold an image twice, under two labels, with two maps.

        Args:
            labels: Labels of the rows, int32 [n].
            digests: Digests of the images, uint8 [m, 16].
            wanted: Labels of the images, int32 [m]; they decide where several rows have the digest.
        """
        begin, end = self.spans(digests)
        found = np.full(len(begin), -1, np.int64)
        some = end > begin
        found[some] = self._order[begin[some]]
        doubtful = []
        chosen: dict[tuple[int, int], int] = {}  # a placeholder may occur ten thousand times
        for image in np.flatnonzero(end - begin > 1).tolist():
            case = (int(begin[image]), int(wanted[image]))
            if case not in chosen:
                rows = self._order[begin[image] : end[image]]
                alike = rows[labels[rows] == wanted[image]]
                chosen[case] = int(alike[0] if len(alike) else rows[0])
                if len(alike) != 1:
                    doubtful.append((image, alike if len(alike) else rows))
            found[image] = chosen[case]
        return Matches(found, doubtful)


def _words(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)  # their order does not matter
    return words[:, 0].copy(), words[:, 1]
