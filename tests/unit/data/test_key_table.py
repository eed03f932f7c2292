"""The hash table of 64-bit keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pocl_ds.data.key_table import KeyTable


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1) | st.integers(0, 4).map(lambda n: n << 20),
            st.integers(1, 99),
        ),
        max_size=400,
    )
)
def test_table_behaves_like_a_dict(pairs: list[tuple[int, int]]) -> None:
    keys, expected = KeyTable(), dict[int, int]()
    for key, number in pairs:
        assert keys.insert(key, number) == expected.get(key, 0)
        expected[key] = number
    assert len(keys) == len(expected)
    assert all(keys.get(key) == number for key, number in expected.items())


def test_table_grows() -> None:
    keys = KeyTable()
    for key in range(0, 2000 << 12, 1 << 12):  # keys that collide in their low bits
        keys.insert(key, key + 1)
    assert len(keys) == 2000 and keys.get(1999 << 12) == (1999 << 12) + 1 and keys.get(5) == 0
