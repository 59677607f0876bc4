import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedapt.protocols.codecs import CODECS, Bf16, Codec, Fp4, Fp32, Int8, SeedProjection, TopK, Uplink, codec_of
from fedapt.protocols.dense import Codes, Matrix
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import AdapterLayout, Flat, Role, TensorSpec
from fedapt.protocols.spec import Wire

# Beyond these magnitudes fp32 itself loses digits (below) or the rounded value overflows (above).
NORMAL = st.just(0.0) | st.floats(2.0**-100, 2.0**100, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
COMPOSED: dict[str, Codec] = {
    "top-k of fp32": TopK(0.1, CODECS["fp32"]),
    "top-k of int8": TopK(0.6, CODECS["int8"]),
    "top-k of fp4": TopK(1.0, CODECS["fp4"]),
    "seed-projection to fp32": SeedProjection(40, CODECS["fp32"]),
    "seed-projection to fp4": SeedProjection(3, CODECS["fp4"]),
}
ALL = CODECS | COMPOSED
codecs = pytest.mark.parametrize("codec", ALL.values(), ids=ALL.keys())


@st.composite
def coded(draw: st.DrawFn) -> tuple[AdapterLayout, Flat]:
    """A layout and values that fit it."""
    layout = draw(st.from_type(AdapterLayout))
    return layout, draw(hnp.arrays(np.float32, (layout.size,), elements=NORMAL))


def layout_of(*shape: int, role: Role = "other") -> AdapterLayout:
    return AdapterLayout([TensorSpec("m", shape, role)])


def row_maxima(layout: AdapterLayout, flat: Flat) -> Flat:
    """max|row| for every value: the plain reading of Int8's docstring."""
    maxima = {}
    for name, values in layout.split(flat).items():
        role = next(t.role for t in layout.tensors if t.name == name)
        axes: tuple[int, ...] | None = tuple(range(1, values.ndim)) if values.ndim > 1 else None
        if values.ndim > 1 and role == "B":
            axes = (0,)
        maxima[name] = np.broadcast_to(np.abs(values).max(axis=axes, keepdims=True, initial=0.0), values.shape)
    return layout.join(maxima)


@codecs
@given(coded(), st.integers(0, 2**128 - 1))
def test_a_payload_has_the_size_announced(codec: Codec, case: tuple[AdapterLayout, Flat], key: int) -> None:
    layout, flat = case
    payload = codec.encode(flat, layout, key)
    assert len(payload) == codec.size(layout)
    decoded = codec.decode(payload, layout)
    assert decoded.dtype == np.float32
    assert decoded.shape == flat.shape


@codecs
@given(coded())
def test_encoding_leaves_its_input_alone_and_depends_on_the_key_alone(
    codec: Codec, case: tuple[AdapterLayout, Flat]
) -> None:
    layout, flat = case
    before = flat.copy()
    assert codec.encode(flat, layout, key=5) == codec.encode(flat, layout, key=5)
    assert np.array_equal(flat, before)


@given(st.from_type(AdapterLayout), st.data())
def test_fp32_is_lossless(layout: AdapterLayout, data: st.DataObject) -> None:
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    flat = data.draw(hnp.arrays(np.float32, (layout.size,), elements=finite))
    assert Fp32().decode(Fp32().encode(flat, layout, 0), layout).tobytes() == flat.tobytes()


@given(coded())
def test_bf16_rounds_as_torch_does(case: tuple[AdapterLayout, Flat]) -> None:
    layout, flat = case
    decoded = Bf16().decode(Bf16().encode(flat, layout, 0), layout)
    assert np.array_equal(decoded, torch.from_numpy(flat).to(torch.bfloat16).to(torch.float32).numpy())
    assert (np.abs(decoded - flat) <= 2.0**-8 * np.abs(flat)).all()


def test_bf16_ties_go_to_even() -> None:
    flat = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    decoded = Bf16().decode(Bf16().encode(flat, layout_of(4), 0), layout_of(4))
    assert decoded.tolist() == [1, 1 + 2**-6, -1, 1 + 2**-7]


@given(mantissa=st.integers(1, 2**23 - 1), negative=st.booleans())
@example(mantissa=2**23 - 1, negative=False)  # what GPUs write: rounded as a number, it would be -0
@example(mantissa=2**23 - 1, negative=True)  # and this one 0
@example(mantissa=1, negative=False)  # and this one infinity
def test_bf16_keeps_every_nan(mantissa: int, negative: bool) -> None:
    flat = np.array([0x7F800000 | mantissa | negative << 31], np.uint32).view(np.float32)
    payload = Bf16().encode(flat, layout_of(1), 0)
    assert payload == b"\xc0\x7f"
    with pytest.raises(PayloadError, match="NaN or infinity"):
        Bf16().decode(payload, layout_of(1))


@given(coded(), st.integers(0, 2**64))
def test_int8_error_bound(case: tuple[AdapterLayout, Flat], key: int) -> None:
    """|decode(encode(x)) − x| < max|row|/127; the slack is the rounding of fp32 in scale and product."""
    layout, flat = case
    decoded = Int8().decode(Int8().encode(flat, layout, key), layout).astype(np.float64)
    bound = row_maxima(layout, flat).astype(np.float64)
    assert (np.abs(decoded - flat) <= bound / 127 * (1 + 1e-4)).all()
    assert (decoded[bound == 0] == 0).all()


def one_row(flat: Flat, round_to: np.ufunc) -> bytes:
    """Int8's payload of one vector, rounded by a fixed rule."""
    scale = np.abs(flat).max(keepdims=True) / np.float32(127)
    return b"".join((scale.astype("<f4").tobytes(), round_to(flat / scale).astype(np.int8).tobytes()))


MAGNITUDES = np.array([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])


@given(coded(), st.integers(0, 2**64))
def test_fp4_takes_one_of_the_two_magnitudes_around_a_value(case: tuple[AdapterLayout, Flat], key: int) -> None:
    """The docstring's grid, read plainly; the slack is the rounding of fp32."""
    layout, flat = case
    decoded = Fp4().decode(Fp4().encode(flat, layout, key), layout).astype(np.float64)
    scale = row_maxima(layout, flat).astype(np.float64)
    grid = MAGNITUDES * scale[:, None]
    exact = np.abs(flat.astype(np.float64))[:, None]
    below = np.where(grid <= exact, grid, 0).max(axis=1, initial=0)
    above = np.where(grid >= exact, grid, np.inf).min(axis=1, initial=np.inf)
    assert np.all((np.abs(decoded) == below) | (np.abs(decoded) == above))
    assert np.all((decoded == 0) | (np.sign(decoded) == np.sign(flat)))
    assert np.all((np.abs(decoded - flat) < np.maximum(exact[:, 0], scale / 64)) | (scale == 0))
    assert np.all(decoded[scale == 0] == 0)


def test_fp4_bytes() -> None:
    """What lies on the grid is exact: a scale of 4 bytes, then codes from the low half of a byte up."""
    flat = np.array([4, -2, 0, 1 / 16, -1 / 8], np.float32)
    payload = Fp4().encode(flat, layout_of(5), 0)
    assert payload == np.array([4], "<f4").tobytes() + bytes([0xE7, 0x10, 0x0A])
    assert Fp4().decode(payload, layout_of(5)).tolist() == flat.tolist()


@pytest.mark.parametrize(("codes", "count"), [(b"\x08", 1), (b"\x80", 2), (b"\x17", 1), (b"\x77\xf1", 3)])
def test_fp4_refuses_minus_zero_and_a_code_too_many(codes: bytes, count: int) -> None:
    scale = np.array([0.5], "<f4").tobytes()
    assert Fp4().decode(scale + bytes(len(codes)), layout_of(count)).tolist() == [0.0] * count
    with pytest.raises(PayloadError, match="minus zero, or a code after the last value"):
        Fp4().decode(scale + codes, layout_of(count))


class Fp4Down(Fp4):
    """A negative control: always the magnitude below, which is a bias."""

    def rounded(self, values: Matrix, random: Matrix) -> Codes:
        return super().rounded(values, np.ones_like(random))


class Fp4Nearest(Fp4):
    """A second control: rounds to nearest, which is a bias for each single value."""

    def rounded(self, values: Matrix, random: Matrix) -> Codes:
        return super().rounded(values, np.full_like(random, 0.5))


class Truncating(Int8):
    """The negative control: rounds towards zero, which is a bias."""

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        return one_row(flat, np.trunc)


class Nearest(Int8):
    """The second control: rounds to nearest, which is a bias for each single value."""

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        return one_row(flat, np.rint)


def largest_z(codec: Codec, step: float = 1 / 127, draws: int = 400) -> float:
    """The largest z-score of a coordinate's mean error; rounding at random has a deviation of at most half a step.

    A step is `step` of the largest magnitude; fp4's grows with the value, to at most the value itself.
    """
    flat = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    layout = layout_of(200)
    errors = [codec.decode(codec.encode(flat, layout, key), layout) - flat.astype(np.float64) for key in range(draws)]
    steps = np.full(200, float(np.abs(flat).max()) * step)
    if codec.name == "fp4":
        steps = np.maximum(steps, np.abs(flat))
    return float(np.abs(np.mean(errors, axis=0) / (0.5 * steps / np.sqrt(draws))).max())


def test_int8_is_unbiased_and_the_test_would_see_a_bias() -> None:
    assert largest_z(Int8()) < 5
    assert largest_z(Truncating()) > 10
    assert largest_z(Nearest()) > 10


def test_fp4_is_unbiased_and_the_test_would_see_a_bias() -> None:
    assert largest_z(Fp4(), step=1 / 64) < 5
    assert largest_z(Fp4Down(), step=1 / 64) > 10
    assert largest_z(Fp4Nearest(), step=1 / 64) > 10


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e30, 1e37])
@codecs
def test_magnitudes_at_the_ends_of_fp32_arrive(codec: Codec, magnitude: float) -> None:
    flat = np.array([magnitude, -magnitude, magnitude / 3, 0], np.float32)
    decoded = codec.decode(codec.encode(flat, layout_of(4), 1), layout_of(4))
    assert np.abs(decoded).max() < 16 * magnitude
    assert magnitude < 1e-40 or np.abs(decoded).max() > magnitude / 16


@codecs
def test_zero_is_coded_exactly(codec: Codec) -> None:
    layout = layout_of(37, 3, role="B")
    zero = np.zeros(layout.size, np.float32)
    assert np.array_equal(codec.decode(codec.encode(zero, layout, 5), layout), zero)


def test_int8_rounds_by_key() -> None:
    flat = np.random.default_rng(1).standard_normal(100).astype(np.float32)
    first, second = (Int8().encode(flat, layout_of(100), key) for key in (1, 2))
    assert first != second
    assert first[:4] == second[:4], "the scale does not depend on the key"


def test_int8_scales_b_by_column_and_a_by_row() -> None:
    """One small rank component keeps its digits beside a large one; scaled by the other axis it would vanish."""
    b = np.random.default_rng(2).standard_normal((40, 2)).astype(np.float32) * np.array([1, 1e-4], np.float32)

    def small_component_error(values: Flat, layout: AdapterLayout) -> float:
        error = Int8().decode(Int8().encode(values, layout, 3), layout) - values
        return float(np.abs(error[np.abs(values) < 1e-3]).max())

    by_column = small_component_error(b.ravel(), layout_of(40, 2, role="B"))
    by_row_of_a = small_component_error(np.ascontiguousarray(b.T).ravel(), layout_of(2, 40, role="A"))
    by_row = small_component_error(b.ravel(), layout_of(40, 2, role="other"))
    assert max(by_column, by_row_of_a) < 4e-4 / 127 < 1e-4 < by_row


@codecs
@given(coded(), st.integers(-3, 5).filter(bool))
def test_a_wrong_length_is_refused(codec: Codec, case: tuple[AdapterLayout, Flat], change: int) -> None:
    layout, flat = case
    payload = codec.encode(flat, layout, 0)
    wrong = payload[:change] if change < 0 else payload + bytes(change)
    if len(wrong) != len(payload):
        with pytest.raises(PayloadError, match=rf"{len(wrong)} bytes received, .* has {len(payload)}"):
            codec.decode(wrong, layout)


@codecs
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_travel_and_are_refused(codec: Codec, value: float) -> None:
    flat = np.array([1, 2, value, 4], np.float32)
    with pytest.raises(PayloadError, match="NaN or infinity"):
        codec.decode(codec.encode(flat, layout_of(4), 0), layout_of(4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
def test_planted_values_that_are_not_finite_are_refused(codec: Codec, value: float) -> None:
    first = np.array([value], "<f4").tobytes()
    payloads = {"fp32": first + bytes(4), "bf16": first[2:] + bytes(2), "int8": first + bytes(2), "fp4": first + b"\0"}
    with pytest.raises(PayloadError, match="NaN or infinity"):
        codec.decode(payloads[codec.name], layout_of(2))


def test_int8_refuses_minus_128_a_negative_scale_and_an_overflow() -> None:
    scale = np.array([0.5], "<f4").tobytes()
    assert Int8().decode(scale + b"\x81\x7f", layout_of(2)).tolist() == [-63.5, 63.5]
    with pytest.raises(PayloadError, match="-128"):
        Int8().decode(scale + b"\x80\x00", layout_of(2))
    with pytest.raises(PayloadError, match="negative scale"):
        Int8().decode(np.array([-0.5], "<f4").tobytes() + b"\x01\x00", layout_of(2))
    with pytest.raises(PayloadError, match="NaN or infinity"):
        Int8().decode(np.array([3e38], "<f4").tobytes() + b"\x7f\x00", layout_of(2))


@codecs
@given(st.from_type(AdapterLayout), st.data())
def test_any_bytes_decode_to_finite_values_or_are_refused(
    codec: Codec, layout: AdapterLayout, data: st.DataObject
) -> None:
    size = codec.size(layout)
    try:
        decoded = codec.decode(data.draw(st.binary(min_size=size, max_size=size)), layout)
    except PayloadError:
        return
    assert decoded.shape == (layout.size,)
    assert np.isfinite(decoded).all()


@codecs
@given(coded(), st.booleans())
def test_the_error_of_a_payload_is_what_its_change_lost(
    codec: Codec, given: tuple[AdapterLayout, Flat], informed: bool
) -> None:
    (layout, flat), uplink = given, Uplink(codec, informed)
    payload = uplink.encode(flat, np.abs(flat) if informed else None, layout, key=5)
    lost = np.sum((codec.decode(codec.encode(flat, layout, 5), layout).astype(np.float64) - flat) ** 2)
    wanted = np.sum(flat.astype(np.float64) ** 2)
    assert uplink.error(flat, payload, layout) == pytest.approx((lost / wanted) ** 0.5 if wanted else 0.0)
    assert uplink.error(np.zeros_like(flat), payload, layout) == 0


def test_what_will_be_refused_has_no_error() -> None:
    flat, layout = np.array([1.0, np.nan], np.float32), layout_of(2)
    for codec in ALL.values():
        assert np.isnan(Uplink(codec).error(flat, codec.encode(flat, layout, 0), layout))


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "fp4", "top-k", "seed-projection"])
def test_a_spec_names_its_codec(name: str) -> None:
    assert codec_of(Wire.model_validate({"codec": name})).name == name


def test_a_codec_reads_its_own_keys() -> None:
    """Sizes over 10 000 values: the default, then with each key changed."""
    layout = layout_of(10_000)

    def size(**keys: object) -> int:
        return codec_of(Wire.model_validate(keys)).size(layout)

    assert size(codec="seed-projection") == 8 + 4 * 4096
    assert size(codec="seed-projection", coefficients=100) == 8 + 4 * 100
    assert size(codec="seed-projection", coefficients=100, values="bf16") == 8 + 2 * 100
    assert size(codec="top-k", density=0.01) < size(codec="top-k") / 8
    assert size(codec="top-k", values="bf16") == size(codec="top-k") - 2 * 1000
    assert size(codec="int8", density=0.01, coefficients=1, values="fp4") == 10_000 + 4
