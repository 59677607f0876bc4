"""Results on a node's disk: whole or absent, whatever happens to the process that writes them."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.kept import Kept
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb


def result_of(number: int, payload: bytes) -> pb.Result:
    return pb.Result(question=number.to_bytes(16), kind="delta", weight=1.5, payload=link.blob(payload))


def payload_of(number: int) -> bytes:
    return random.Random(number).randbytes(200_000 + number)


def test_what_is_kept_is_found_by_the_next_process(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "new" / "folder")
    for number in range(5):
        kept.keep(result_of(number, payload_of(number)), payload_of(number))
        os.utime(next((tmp_path / "new" / "folder").glob(f"*{number}.result")), ns=(number, number))
    again = Kept(tmp_path / "new" / "folder")
    assert [int.from_bytes(result.question) for result in again] == list(range(5)), "oldest first"
    again.drop((2).to_bytes(16))
    again.drop((2).to_bytes(16))
    assert again.find((2).to_bytes(16)) is None
    assert again.find((3).to_bytes(16)) == (result_of(3, payload_of(3)), payload_of(3))


def test_a_newer_result_replaces_the_older(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for payload in (bytes(10), b"other"):
        kept.keep(result_of(1, payload), payload)
    assert kept.find((1).to_bytes(16)) == (result_of(1, b"other"), b"other")


@given(st.data())
def test_a_damaged_file_is_no_result(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut anywhere it is absent, and never an error."""
    folder = tmp_path_factory.mktemp("kept")
    kept, payload = Kept(folder), b"payload"
    kept.keep(result_of(1, payload), payload)
    (path,) = folder.glob("*.result")
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert list(kept) == []
    assert not path.exists()


def write_for_ever(folder: Path) -> None:
    kept, number = Kept(folder), 0
    while True:
        number += 1
        kept.keep(result_of(number % 4, payload_of(number)), payload_of(number))


def test_killed_while_it_writes(tmp_path: Path) -> None:
    chance, seen = random.Random(0), 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            write_for_ever(tmp_path)
        time.sleep(chance.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        files = len(list(tmp_path.glob("*.result")))
        kept = Kept(tmp_path)
        assert not list(tmp_path.glob("*.new"))
        found = [kept.find(result.question) for result in kept]
        assert len(found) == files, "each file is a whole result"
        for whole in found:
            assert whole is not None
            assert whole[0].payload == link.blob(whole[1])
        seen += files
    assert seen > 20
