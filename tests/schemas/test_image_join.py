"""Finding rows by the digests of images: equal images, labels that decide, digests that share a half."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from zpipe.schemas.image_digest import DIGEST_BYTES, image_digest
from zpipe.schemas.image_join import DigestRows, digest_column

# Few values in each half, so that digests are repeated and halves are shared.
DIGESTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=40)


def as_digests(rows):
    return np.array([[high, low] for high, low, _ in rows], np.uint64).reshape(-1, 2).view(np.uint8).reshape(-1, 16)


def labels_of(rows):
    return np.array([label for *_, label in rows], np.int32)


@settings(deadline=None)
@given(DIGESTS, DIGESTS)
def test_each_image_finds_its_row_and_equal_images_are_told_apart_by_label(rows, images):
    matches = DigestRows(as_digests(rows)).match(labels_of(rows), as_digests(images), labels_of(images))
    doubtful = {}  # once for each image and label, however often they occur
    for number, (high, low, label) in enumerate(images):
        same = [row for row, (*digest, _) in enumerate(rows) if digest == [high, low]]
        alike = [row for row in same if rows[row][2] == label]
        assert matches.rows[number] == (alike or same or [-1])[0]
        if len(same) > 1 and len(alike) != 1:
            doubtful.setdefault((high, low, label), (number, alike or same))
    assert [(image, found.tolist()) for image, found in matches.doubtful] == list(doubtful.values())


@settings(deadline=None)
@given(DIGESTS)
def test_the_rows_of_one_digest(rows):
    table = DigestRows(as_digests(rows))
    for digest in {bytes(row) for row in as_digests(rows)} | {bytes(range(16))}:
        assert table.rows(digest).tolist() == [
            row for row, each in enumerate(as_digests(rows)) if bytes(each) == digest
        ]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), max_size=9), st.integers(0, 9), st.integers(1, 4))
def test_digests_come_out_of_a_column_whatever_its_chunks(digests, start, size):
    column = pa.chunked_array(
        [pa.array(digests[i : i + size], pa.binary(DIGEST_BYTES)) for i in range(0, len(digests), size)],
        pa.binary(DIGEST_BYTES),
    ).slice(start)
    assert [bytes(row) for row in digest_column(column)] == digests[start:]


def test_the_digest_is_that_of_xxh128sum():
    # Published by the xxHash project (its specification and `xxh128sum`): XXH3-128 of no bytes, seed 0.
    assert image_digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert image_digest(b"a") != image_digest(b"b")
