"""Conversions between protobuf and plain values are lossless."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import InvalidRequest
from outrider.runtime.protobuf import (
    FLOAT32,
    UINT16,
    UINT32,
    pack,
    sampling_from_proto,
    sampling_to_proto,
    unpack,
    verification_from_proto,
    verification_to_proto,
)
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.v1 import sampling_pb2


@pytest.mark.parametrize(("dtype", "limit"), [(UINT16, 2**16), (UINT32, 2**32)])
@given(data=st.data())
def test_integers_round_trip(dtype: np.dtype[Any], limit: int, data: st.DataObject) -> None:
    """Lists and arrays, including empty ones."""
    values = data.draw(st.lists(st.integers(0, limit - 1), max_size=20))
    packed = pack(values, dtype)
    assert len(packed) == dtype.itemsize * len(values)
    assert unpack(packed, dtype, "f").tolist() == values
    assert pack(np.array(values, np.int64), dtype) == packed
    assert pack(iter(values), dtype) == packed


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20))
def test_floats_round_trip(values: list[float]) -> None:
    """float32 bit for bit, infinities included."""
    assert unpack(pack(values, FLOAT32), FLOAT32, "f").tolist() == values


def test_bytes_are_little_endian() -> None:
    """The wire's byte order, on any machine."""
    assert pack([1, 258], UINT32) == b"\x01\0\0\0\x02\x01\0\0"
    assert pack([258], UINT16) == b"\x02\x01"
    assert pack([1.0], FLOAT32) == b"\0\0\x80\x3f"


def test_slices_and_other_types_are_packed_by_value() -> None:
    """Strides and source types do not affect the bytes."""
    array = np.arange(10, dtype=np.int16)
    assert unpack(pack(array[::3], UINT32), UINT32, "f").tolist() == [0, 3, 6, 9]


def test_unpacked_arrays_are_read_only() -> None:
    """A view of the message's bytes."""
    array: npt.NDArray[Any] = unpack(pack([1], UINT32), UINT32, "f")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


@pytest.mark.parametrize("dtype", [UINT16, UINT32, FLOAT32])
def test_a_length_that_is_not_a_multiple_is_an_error_naming_the_field(dtype: np.dtype[Any]) -> None:
    """The length must be a multiple of the item size."""
    with pytest.raises(InvalidRequest) as caught:
        unpack(b"\0" * (dtype.itemsize + 1), dtype, "rows.draft_token_ids")
    assert caught.value.field == "rows.draft_token_ids"


@pytest.mark.parametrize("method", Verification)
def test_verification_round_trips(method: Verification) -> None:
    """Every method has a number."""
    assert verification_from_proto(verification_to_proto(method)) is method


def test_verification_unset_and_unknown() -> None:
    """Unset means rejection. An unknown number of a later version is an error."""
    unset = sampling_pb2.VERIFICATION_UNSPECIFIED
    assert verification_from_proto(unset) is Verification.REJECTION
    with pytest.raises(InvalidRequest) as caught:
        verification_from_proto(77)  # type: ignore[arg-type]
    assert caught.value.field == "verification"


def _from_proto(message: sampling_pb2.SamplingParams) -> SamplingParams:
    return sampling_from_proto(message, default_max_tokens=321, default_seed=654)


def test_unset_fields_take_their_defaults() -> None:
    """An empty message is the default parameters, with the server's max_tokens and seed."""
    assert _from_proto(sampling_pb2.SamplingParams()) == SamplingParams(max_tokens=321, seed=654)


def test_zero_is_not_unset() -> None:
    """A field that is present is used, even if its value is zero."""
    params = _from_proto(
        sampling_pb2.SamplingParams(temperature=0, seed=0, max_tokens=0, logprobs=0, top_p=0)
    )
    assert (params.temperature, params.seed, params.max_tokens) == (0, 0, 0)
    assert (params.logprobs, params.top_p) == (0, 0)


@pytest.mark.parametrize("value", [0.7, 0.1, 0.95, 1e-3, 1.05, 0.333333, 1e-30, -1.5, 100.0])
def test_floats_become_their_shortest_decimals(value: float) -> None:
    """0.7 arrives as 0.7, not as 0.699999988, so both tiers and the client agree."""
    params = _from_proto(sampling_pb2.SamplingParams(temperature=value, logit_bias={3: value}))
    assert params.temperature == value
    assert params.logit_bias == {3: value}


@given(st.floats(width=32, allow_nan=False))
def test_any_float32_round_trips(value: float) -> None:
    """The shortest decimal is the same float32, infinities included."""
    params = _from_proto(sampling_pb2.SamplingParams(top_p=value))
    assert np.float32(params.top_p) == np.float32(value)


_decimals = st.integers(-2000, 2000).map(lambda n: n / 1000)
_ids = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)

_params = st.builds(
    SamplingParams,
    temperature=_decimals,
    top_p=_decimals,
    top_k=st.integers(-(2**31), 2**31 - 1),
    min_p=_decimals,
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(0, 2**32 - 1),
    min_tokens=st.integers(0, 2**32 - 1),
    stop=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    stop_token_ids=_ids,
    ignore_eos=st.booleans(),
    presence_penalty=_decimals,
    frequency_penalty=_decimals,
    repetition_penalty=_decimals,
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), _decimals, max_size=5),
    logprobs=st.none() | st.integers(0, 2**32 - 1),
    allowed_token_ids=_ids,
    structured_outputs=st.none()
    | st.builds(
        StructuredOutputs,
        json=st.none() | st.text(max_size=5),
        json_object=st.booleans(),
        regex=st.none() | st.text(max_size=5),
        choice=st.lists(st.text(max_size=5), max_size=3).map(tuple),
        grammar=st.none() | st.text(max_size=5),
        structural_tag=st.none() | st.text(max_size=5),
    ),
)


@given(_params)
@settings(deadline=None)
def test_sampling_parameters_round_trip(params: SamplingParams) -> None:
    """Equal after serialisation, whatever the receiver's defaults."""
    message = sampling_to_proto(params)
    parsed = sampling_pb2.SamplingParams.FromString(message.SerializeToString())
    assert _from_proto(parsed) == params


def test_message_and_dataclass_have_the_same_fields() -> None:
    """So no field can be missing in a conversion."""
    in_message = set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert in_message == set(SamplingParams.__dataclass_fields__)
