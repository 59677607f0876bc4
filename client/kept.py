"""Results that the server has not acknowledged yet: on disk before they are announced, gone when they are received."""

import os
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from ..protocols import link_pb2 as pb

HEADER = 8
"""Bytes that hold the length of the frame, before the frame and the payload."""


class Kept:
    """One file a result in `folder`, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for left in folder.glob("*.new"):
            left.unlink()

    def keep(self, result: pb.Result, payload: bytes) -> None:
        """Durable when it returns."""
        frame = result.SerializeToString()
        path = self._path(result.question)
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            for part in (len(frame).to_bytes(HEADER), frame, payload):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync(self.folder)

    def find(self, question: bytes) -> tuple[pb.Result, bytes] | None:
        """A result and its payload; None where there is none, or where its file is damaged (it is then dropped)."""
        path = self._path(question)
        try:
            data = path.read_bytes()
            end = HEADER + int.from_bytes(data[:HEADER])
            result = pb.Result.FromString(data[HEADER:end])
        except FileNotFoundError:
            return None
        except DecodeError:
            path.unlink()
            return None
        payload = data[end:]
        if len(data) < end or result.question != question or len(payload) != result.payload.size:
            path.unlink()
            return None
        return result, payload

    def drop(self, question: bytes) -> None:
        self._path(question).unlink(missing_ok=True)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.glob("*.result"))

    def __iter__(self) -> Iterator[pb.Result]:
        """All that are kept, oldest first."""
        for path in sorted(self.folder.glob("*.result"), key=lambda path: path.stat().st_mtime_ns):
            try:
                found = self.find(bytes.fromhex(path.stem))
            except ValueError:  # somebody else's file
                continue
            if found is not None:
                yield found[0]

    def _path(self, question: bytes) -> Path:
        return self.folder / f"{question.hex()}.result"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
