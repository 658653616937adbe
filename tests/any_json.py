"""Any JSON value, for fields that strangers may have written."""

from hypothesis import strategies as st


def any_json():
    """A strategy: numbers beyond any bound, texts of any characters, lists and objects of them."""
    numbers = (
        st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([2**63, -(2**80), 1e308])
    )
    return st.recursive(
        st.none() | st.booleans() | numbers | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    )
