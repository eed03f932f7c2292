"""Keys that were met before, among ten millions of them, in little memory."""

from __future__ import annotations

from array import array


class SeenKeys:
    """64-bit keys, each with a number of 1 or more, in 16 bytes a slot: ten million take 270 MB, a
    dict six times that.

    Open addressing. That two different ids among ten million share a key has a chance of 3 in a
    million.
    """

    def __init__(self) -> None:
        self._count, self._bits = 0, 10
        self._keys, self._numbers = self._tables()

    def __len__(self) -> int:
        return self._count

    def get(self, key: int) -> int:
        """The number at a key, 0 where there is none."""
        return self._numbers[self._slot(key)]

    def put(self, key: int, number: int) -> int:
        """Set the number at a key; returns the one that was there, 0 where there was none."""
        slot = self._slot(key)
        earlier = self._numbers[slot]
        self._keys[slot], self._numbers[slot] = key, number
        if not earlier:
            self._count += 1
            if self._count > 0.7 * (1 << self._bits):
                self._grow()
        return earlier

    def _tables(self) -> tuple[array[int], array[int]]:
        return array("Q", bytes(8 << self._bits)), array("Q", bytes(8 << self._bits))

    def _slot(self, key: int) -> int:
        mask = (1 << self._bits) - 1
        slot = key & mask
        while self._numbers[slot] and self._keys[slot] != key:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, numbers = self._keys, self._numbers
        self._bits += 1
        self._keys, self._numbers = self._tables()
        for key, number in zip(keys, numbers):
            if number:
                slot = self._slot(key)
                self._keys[slot], self._numbers[slot] = key, number
