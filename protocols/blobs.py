"""Bytes known by their hash: cut into chunks on one side, put together and checked on the other."""

import hashlib

from .errors import PayloadError

CHUNK_BYTES = 256 << 10
"""Bytes of one chunk: large enough for the speed of a memory copy, small enough that a heartbeat is soon through: at
13 kB/s a chunk takes the 20 s after which a silent stream is given up."""

INLINE_BYTES = 64 << 10
"""Blobs up to here come with the frame that names them, which saves a round trip."""


def digest(data: bytes) -> bytes:
    """The 32 bytes by which `data` is known (SHA-256)."""
    return hashlib.sha256(data).digest()


class Assembly:
    """A blob that arrives in chunks.

    Chunks may come again and may overlap: what is there already is skipped. `have` is where the next one must start, so a
    broken stream goes on from it. Memory grows with the bytes that came, never with the size that was claimed.
    """

    def __init__(self, sha256: bytes, size: int) -> None:
        self.sha256, self.size = sha256, size
        self._data = bytearray()
        self._hash = hashlib.sha256()

    @property
    def have(self) -> int:
        return len(self._data)

    @property
    def complete(self) -> bool:
        return self.have == self.size

    def add(self, offset: int, data: bytes) -> bool:
        """Take a chunk. False where it begins beyond what is there: the sender has to go back to `have`.

        Raises PayloadError for bytes beyond the size, and for a blob whose hash is not what it was known by; it is then
        empty again, because nobody knows which chunk was wrong.
        """
        if offset + len(data) > self.size:
            raise PayloadError(f"a chunk ends at byte {offset + len(data)} of a blob of {self.size}")
        if offset > self.have:
            return False
        new = memoryview(data)[self.have - offset :]
        self._data += new
        self._hash.update(new)
        if self.complete and self._hash.digest() != self.sha256:
            found = self._hash.hexdigest()
            self._data, self._hash = bytearray(), hashlib.sha256()
            raise PayloadError(f"a blob has SHA-256 {found[:12]}…, not {self.sha256.hex()[:12]}…")
        return True

    def take(self) -> bytes:
        """The blob, once it is complete."""
        assert self.complete
        return bytes(self._data)
