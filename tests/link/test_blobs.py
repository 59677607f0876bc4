"""Blobs in chunks: whatever order, cut and repetition they come in, the bytes that come out are those that are named."""

import tracemalloc
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.blobs import Assembly, digest
from fedapt.protocols.errors import PayloadError

blobs = st.binary(max_size=300)


@given(blobs)
def test_a_blob_is_known_by_its_sha256(data: bytes) -> None:
    assert digest(data) == sha256(data).digest()


@given(blobs, st.data())
def test_any_cuts_repetitions_and_overlaps_give_the_blob(data: bytes, drawn: st.DataObject) -> None:
    """The sender goes where it is told to whenever a chunk does not fit, and repeats itself at random in between."""
    assembly = Assembly(digest(data), len(data))
    while not assembly.complete:
        offset = drawn.draw(st.integers(0, len(data)))
        end = drawn.draw(st.integers(offset, len(data)))
        before = assembly.have
        assert assembly.add(offset, data[offset:end]) == (offset <= before)
        assert assembly.have == (max(before, end) if offset <= before else before)
        assembly.add(assembly.have, data[assembly.have : assembly.have + 40])
    assert assembly.take() == data
    for offset in range(len(data)):
        assert assembly.add(offset, data[offset:]), "what comes again changes nothing"
    assert assembly.take() == data


@given(blobs, blobs, st.integers(1, 50))
def test_other_bytes_are_never_taken(data: bytes, other: bytes, step: int) -> None:
    """Where the hash is wrong nothing is kept, and the right bytes are still welcome."""
    assembly = Assembly(digest(data), len(other))
    if data == other:
        return
    if not other:
        assert assembly.complete, "an empty blob has no chunk: its hash is for who names it to check"
        return
    last = (len(other) - 1) // step * step
    for offset in range(0, last, step):
        assembly.add(offset, other[offset : offset + step])
    with pytest.raises(PayloadError, match="SHA-256"):
        assembly.add(last, other[last:])
    assert assembly.have == 0
    if len(data) == len(other):
        assembly.add(0, data)
        assert assembly.take() == data


@given(blobs, st.integers(0, 2**64), st.binary(min_size=1, max_size=50))
def test_bytes_beyond_the_size_are_refused(data: bytes, offset: int, extra: bytes) -> None:
    assembly = Assembly(digest(data), len(data))
    if offset + len(extra) <= len(data):
        return
    with pytest.raises(PayloadError, match="ends at byte"):
        assembly.add(offset, extra)
    assert assembly.have == 0


def test_memory_grows_with_what_came_and_not_with_what_was_claimed() -> None:
    tracemalloc.start()
    try:
        claims = [Assembly(bytes(32), 2**40) for _ in range(100)]
        for claim in claims:
            claim.add(0, b"a little")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
