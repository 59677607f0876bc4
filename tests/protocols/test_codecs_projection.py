from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.codecs import CODECS, Codec, SeedProjection
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.keys import derive
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.philox import Signs, signs, signs_reference
from fedapt.protocols.projection import KEY_BYTES, Block

# Two tensors of two blocks each, and a scalar.
LAYOUT = AdapterLayout(
    [TensorSpec(name, shape, "other") for name, shape in (("a", (16, 12)), ("b", (192,)), ("c", ()))]
)
TWIN = np.random.default_rng(0).standard_normal(192).astype(np.float32)
FLAT: Flat = np.concatenate([TWIN, TWIN, np.array([2.5], np.float32)])


def decoded(codec: Codec, draws: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """What arrives under so many keys: (draws, values)."""
    payloads = (codec.encode(FLAT, LAYOUT, key) for key in range(draws))
    return np.stack([codec.decode(payload, LAYOUT).astype(np.float64) for payload in payloads])


class UnderScaled(SeedProjection):
    """A negative control: Ferret's published factor, a third of the right one."""

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        return super().decode(payload, layout) / np.float32(3)


class SharedKey(SeedProjection):
    """A negative control: the same directions for every block, as in Ferret's published code."""

    def _directions(self, layout: AdapterLayout, root: int) -> Iterator[tuple[Block, Signs]]:
        for block in self.blocks(layout):
            yield block, signs(root, block.directions, block.stop - block.start)


class Certain(SeedProjection):
    """A negative control: one key for every payload, so that no mean over keys removes the error."""

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        return super().encode(flat, layout, 0)


def largest_z(codec: SeedProjection, draws: int = 400) -> float:
    """The largest z-score of a value's mean error, by the variance (‖x_b‖² − x_i²)/K_b of a value in its block."""
    variance = np.zeros(LAYOUT.size)
    for block in codec.blocks(LAYOUT):
        values = FLAT[block.start : block.stop].astype(np.float64)
        variance[block.start : block.stop] = (np.sum(values**2) - values**2) / block.directions
    errors = decoded(codec, draws).mean(axis=0) - FLAT
    return float(np.abs(errors[:-1] / np.sqrt(variance[:-1] / draws)).max())


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_it_is_unbiased_and_the_test_would_see_a_bias(values: str) -> None:
    assert largest_z(SeedProjection(200, CODECS[values])) < 5
    assert largest_z(UnderScaled(200, CODECS[values])) > 10
    assert largest_z(Certain(200, CODECS[values])) > 10


def error_correlation(codec: Codec) -> float:
    """Of the errors of the two tensors with equal values."""
    errors = decoded(codec, 50) - FLAT
    return float(np.corrcoef(errors[:, :192].ravel(), errors[:, 192:384].ravel())[0, 1])


def test_blocks_err_independently_and_the_test_would_see_a_shared_key() -> None:
    inner = CODECS["fp32"]
    assert abs(error_correlation(SeedProjection(100, inner))) < 0.05
    assert error_correlation(SharedKey(100, inner)) > 0.95


def mean_square(codec: Codec, draws: int = 300) -> float:
    return float(np.mean(np.sum((decoded(codec, draws) - FLAT) ** 2, axis=1)))


def announced(codec: SeedProjection) -> float:
    """Σ ‖x_b‖²·(d_b − 1)/K_b, as the docstring has it."""
    return sum(
        float(np.sum(FLAT[b.start : b.stop].astype(np.float64) ** 2)) * (b.stop - b.start - 1) / b.directions
        for b in codec.blocks(LAYOUT)
    )


@pytest.mark.parametrize("coefficients", [30, 120, 480])
def test_the_error_is_the_one_announced_and_falls_as_one_over_the_root(coefficients: int) -> None:
    codec = SeedProjection(coefficients, CODECS["fp32"])
    error = mean_square(codec)
    assert error == pytest.approx(announced(codec), rel=0.1)
    energy = float(np.sum(FLAT.astype(np.float64) ** 2))
    assert np.sqrt(error / energy) == pytest.approx(np.sqrt(LAYOUT.size / coefficients), rel=0.2)
    assert abs(mean_square(UnderScaled(coefficients, CODECS["fp32"])) / announced(codec) - 1) > 0.1


@given(st.from_type(AdapterLayout), st.integers(1, 300))
def test_blocks_cover_each_tensor_and_share_out_the_coefficients(layout: AdapterLayout, coefficients: int) -> None:
    codec = SeedProjection(coefficients, CODECS["fp32"])
    blocks = codec.blocks(layout)
    covered = [i for block in blocks for i in range(block.start, block.stop)]
    assert covered == list(range(layout.size))
    owners = np.repeat(np.arange(len(layout.tensors)), [t.size for t in layout.tensors])
    assert all(len(set(owners[b.start : b.stop])) == 1 for b in blocks)
    assert all(b.directions >= 1 for b in blocks)
    total = sum(b.directions for b in blocks)
    assert total == (max(coefficients, len(blocks)) if layout.size else 0)
    assert codec.size(layout) == KEY_BYTES + 4 * total


def test_large_tensors_are_cut_and_shares_follow_lengths() -> None:
    layout = AdapterLayout([TensorSpec("long", (100_000,), "other"), TensorSpec("short", (10,), "other")])
    blocks = SeedProjection(1000, CODECS["fp32"]).blocks(layout)
    lengths = {b.stop - b.start for b in blocks[:-2]}
    assert len(blocks) > 50
    assert len(lengths) == 1
    assert all(b.directions == pytest.approx(1000 * (b.stop - b.start) / 100_010, rel=0.2) for b in blocks[:-2])
    assert blocks[-1].directions <= 2


@given(st.from_type(AdapterLayout), st.integers(0, 2**128 - 1), st.integers(1, 100))
def test_decoding_is_the_formula_of_the_docstring(layout: AdapterLayout, key: int, coefficients: int) -> None:
    """Σ ⟨x, v_k⟩·v_k / K_b, with nothing known of the encoder but the key in the payload."""
    flat = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    codec = SeedProjection(coefficients, CODECS["fp32"])
    payload = codec.encode(flat, layout, key)
    root = int.from_bytes(payload[:KEY_BYTES], "little")
    expected = np.zeros(layout.size)
    for index, block in enumerate(codec.blocks(layout)):
        values = flat[block.start : block.stop].astype(np.float64)
        for v in signs_reference(derive(root, "block", index) % 2**64, block.directions, len(values)):
            expected[block.start : block.stop] += values @ v * v / block.directions
    assert np.allclose(codec.decode(payload, layout), expected, rtol=1e-5, atol=1e-5)


def test_directions_follow_the_key_and_a_block_of_one_value_is_exact() -> None:
    codec = SeedProjection(30, CODECS["fp32"])
    arrived = decoded(codec, 5)
    assert np.unique(arrived[:, 0]).size == 5
    assert np.abs(arrived[:, -1] - FLAT[-1]).max() < 1e-6


def test_a_coefficient_that_is_not_finite_and_a_sum_that_overflows_are_refused() -> None:
    codec, layout = SeedProjection(50, CODECS["fp32"]), AdapterLayout([TensorSpec("m", (2,), "other")])
    for value in (np.nan, np.inf, 3e38):
        with pytest.raises(PayloadError, match="NaN or infinity"):
            codec.decode(bytes(KEY_BYTES) + np.full(50, value, "<f4").tobytes(), layout)
