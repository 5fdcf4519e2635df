"""A set of ids that stays small: a run of millions must not need gigabytes to know what is done.

Reads and writes nothing.
"""

from hashlib import blake2b

BUCKETS = 4096
WIDTH = 8  # bytes kept of an id: two of ten million ids meet by chance three times in a million runs


class IdSet:
    """A set of strings that keeps 8 bytes of each (about 10 with overhead; a Python set takes over 100)."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(BUCKETS)]
        self._size = 0

    def add(self, item: str) -> bool:
        """Adds the item; True if it was not there."""
        digest, bucket = self._place(item)
        if _holds(bucket, digest):
            return False
        bucket += digest
        self._size += 1
        return True

    def __contains__(self, item: str) -> bool:
        digest, bucket = self._place(item)
        return _holds(bucket, digest)

    def __len__(self) -> int:
        return self._size

    def _place(self, item: str) -> tuple[bytes, bytearray]:
        digest = blake2b(item.encode(), digest_size=WIDTH).digest()
        return digest, self._buckets[int.from_bytes(digest[:2]) % BUCKETS]


def _holds(bucket: bytearray, digest: bytes) -> bool:
    """Whether the digest stands in the bucket, and not merely its bytes across two others."""
    at = bucket.find(digest)
    while at >= 0 and at % WIDTH:
        at = bucket.find(digest, at + 1)
    return at >= 0
