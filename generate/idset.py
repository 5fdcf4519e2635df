"""A set of ids that stays small: a run of millions must not need gigabytes to know what is done.

Reads and writes nothing.
"""

from hashlib import blake2b

WIDTH = 8  # bytes kept of an id: two of ten million ids meet by chance three times in a million runs
FULL = 256  # ids per bucket, on average, before there is another bucket


class IdSet:
    """A set of strings that keeps 8 bytes of each (about 10 with overhead; a Python set takes over 100).

    It grows by one bucket at a time (linear hashing, Litwin 1980), so a look-up takes the same time at any size, and no
    call has to move all ids.
    """

    def __init__(self) -> None:
        self._buckets = [bytearray()]
        self._size = 0

    def add(self, item: str) -> bool:
        """Adds the item; True if it was not there."""
        digest = _digest(item)
        bucket = self._buckets[self._place(digest)]
        if _holds(bucket, digest):
            return False
        bucket += digest
        self._size += 1
        if self._size > FULL * len(self._buckets):
            self._grow()
        return True

    def __contains__(self, item: str) -> bool:
        digest = _digest(item)
        return _holds(self._buckets[self._place(digest)], digest)

    def __len__(self) -> int:
        return self._size

    def _place(self, digest: bytes) -> int:
        """The bucket of a digest: its last bits, one bit fewer where that bucket is not there yet."""
        bits = (len(self._buckets) - 1).bit_length()
        place = int.from_bytes(digest) & ((1 << bits) - 1)
        return place if place < len(self._buckets) else place - (1 << (bits - 1))

    def _grow(self) -> None:
        """Adds a bucket, and moves there what belongs there; all of that is in one bucket."""
        new = len(self._buckets)
        old = new - (1 << (new.bit_length() - 1))
        ids = self._buckets[old]
        self._buckets[old] = bytearray()
        self._buckets.append(bytearray())
        for start in range(0, len(ids), WIDTH):
            digest = bytes(ids[start : start + WIDTH])
            self._buckets[self._place(digest)] += digest


def _digest(item: str) -> bytes:
    return blake2b(item.encode(), digest_size=WIDTH).digest()


def _holds(bucket: bytearray, digest: bytes) -> bool:
    """Whether the digest stands in the bucket, and not merely its bytes across two others."""
    at = bucket.find(digest)
    while at >= 0 and at % WIDTH:
        at = bucket.find(digest, at + 1)
    return at >= 0
