"""Kinds of tensors: what is stored comes back, shapes are checked, and stores of maps stay what they were."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from provenances import PROVENANCE

from zpipe.schemas.errors import ZpipeError
from zpipe.schemas.geometry import Box, crop_labels, crop_maps
from zpipe.schemas.manifest import read_extraction, write_extraction
from zpipe.schemas.tensor_kinds import KINDS, decode, encode

REAL = [name for name, kind in KINDS.items() if kind.dtype.kind == "f"]


@settings(deadline=None)
@given(st.data(), st.sampled_from(REAL))
def test_real_values_come_back_to_half_a_unit_of_the_largest(data, name):
    kind = KINDS[name]
    shape = (3, *data.draw(st.tuples(*[st.integers(1, 4)] * len(kind.axes))))
    raw = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
    stored, scale = encode(kind, raw)
    assert stored.dtype == kind.dtype and stored.shape == shape and scale.shape == (3,)
    largest = np.abs(raw).reshape(3, -1).max(axis=1)
    error = np.abs(decode(stored, scale).astype(np.float64) - raw).reshape(3, -1).max(axis=1)
    assert (error <= 2.0**-11 * largest * (1 + 1e-6)).all()


@given(hnp.arrays(np.int64, (2, 3, 4), elements=st.integers(-(2**31), 2**31 - 1)))
def test_whole_numbers_come_back_as_they_are(raw):
    stored, scale = encode(KINDS["label-map"], raw)
    assert stored.dtype == np.int32 and (scale == 1).all()
    np.testing.assert_array_equal(decode(stored, scale), raw)


@pytest.mark.parametrize("value", [0.5, 2**31, np.nan])
def test_what_is_no_whole_number_of_32_bits_is_refused(value):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="whole numbers"):
        encode(KINDS["label-map"], np.full((1, 2, 2), value))


@pytest.mark.parametrize("name", list(KINDS))
def test_a_provenance_states_kind_and_shape_and_is_read_back(tmp_path, name):
    gh, gw = PROVENANCE.grid
    shape = tuple({"h": gh, "w": gw, "k": 3, "d": 5}[axis] for axis in KINDS[name].axes)
    origin = dataclasses.replace(PROVENANCE, kind=name, shape=shape)
    write_extraction(tmp_path, origin)
    assert read_extraction(tmp_path) == origin and origin.sample_shape == shape
    for wrong in ((*shape, 2), (gh + 1, *shape[1:]), (shape[0], gw + 1, *shape[2:])):
        if len(wrong) != len(shape) or (KINDS[name].is_dense and wrong != shape and name != "class-maps"):
            with pytest.raises(ValueError, match=f"kind {name}: shape"):
                dataclasses.replace(origin, shape=wrong)
    content = json.loads((tmp_path / "extraction.json").read_text())
    content["provenance"] |= {"kind": "map", "shape": [gh, gw, 9]}
    (tmp_path / "extraction.json").write_text(json.dumps(content))
    with pytest.raises(ZpipeError, match="has 3 axes, not 2") as error:
        read_extraction(tmp_path)
    assert "\n" not in str(error.value)


def test_a_store_of_maps_says_what_it_always_said():
    assert PROVENANCE.sample_shape == PROVENANCE.grid
    assert not {"kind", "shape"} & set(PROVENANCE.to_json())


BOXES = st.tuples(*[st.floats(0, 1)] * 4).map(lambda e: (min(e[:2]), min(e[2:]), max(e[:2]), max(e[2:])))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), BOXES, st.booleans())
def test_a_label_map_shows_the_label_under_the_centre_of_each_cell(gh, gw, out_h, out_w, edges, flip):
    width, height = 60.0, 40.0
    x1, y1, x2, y2 = edges[0] * width, edges[1] * height, edges[2] * width, edges[3] * height
    if x2 - x1 < 0.1 or y2 - y1 < 0.1:
        return
    labels = np.arange(gh * gw, dtype=np.int32).reshape(1, gh, gw)
    frame, crop = Box(0, 0, width, height), Box(x1, y1, x2, y2)
    found = crop_labels(labels, [frame], [crop], (out_h, out_w), flips=np.array([flip]))[0]
    for row in range(out_h):
        for column in range(out_w):
            seen = out_w - 1 - column if flip else column
            across = (x1 + (seen + 0.5) * (x2 - x1) / out_w) * gw / width
            down = (y1 + (row + 0.5) * (y2 - y1) / out_h) * gh / height
            near_edge = min(abs(across - round(across)), abs(down - round(down))) < 1e-6
            assert near_edge or found[row, column] == labels[0, int(down), int(across)]


@settings(deadline=None)
@given(BOXES, st.booleans(), st.integers(1, 3))
def test_several_maps_of_a_view_are_cropped_like_one(edges, flip, count):
    x1, y1, x2, y2 = edges
    if x2 - x1 < 0.01 or y2 - y1 < 0.01:
        return
    maps = np.random.default_rng(0).random((2, count, 4, 6))
    frames, crops = [Box(0, 0, 1, 1)] * 2, [Box(x1, y1, x2, y2), Box(0, 0, 1, 1)]
    flips = np.array([flip, not flip])
    together = crop_maps(maps, frames, crops, (3, 5), flips=flips)
    for k in range(count):
        np.testing.assert_allclose(together[:, k], crop_maps(maps[:, k], frames, crops, (3, 5), flips=flips), rtol=1e-6)
