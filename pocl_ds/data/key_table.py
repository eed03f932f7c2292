"""A hash table of 64-bit keys that holds ten million entries in little memory."""

from __future__ import annotations

from array import array


class KeyTable:
    """Maps 64-bit keys to numbers of 1 or more, in 16 bytes per slot.

    Ten million keys take 270 MB; a dict takes six times as much. The table uses open addressing.
    The chance that two of ten million different ids have the same 64-bit hash is 3 in a million.
    """

    def __init__(self) -> None:
        self._count, self._bits = 0, 10
        self._keys, self._numbers = self._empty_tables()

    def __len__(self) -> int:
        return self._count

    def get(self, key: int) -> int:
        """The number of a key, 0 if the key is absent."""
        return self._numbers[self._slot(key)]

    def insert(self, key: int, number: int) -> int:
        """Set the number of a key and return the previous one, 0 if the key was absent."""
        slot = self._slot(key)
        previous = self._numbers[slot]
        self._keys[slot], self._numbers[slot] = key, number
        if not previous:
            self._count += 1
            if self._count > 0.7 * (1 << self._bits):
                self._grow()
        return previous

    def _empty_tables(self) -> tuple[array[int], array[int]]:
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
        self._keys, self._numbers = self._empty_tables()
        for key, number in zip(keys, numbers):
            if number:
                slot = self._slot(key)
                self._keys[slot], self._numbers[slot] = key, number
