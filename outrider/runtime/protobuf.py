"""Conversions between generated protobuf types and plain values.

Arrays travel as little-endian bytes. Used in servers, clients and the CLI only.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest
from outrider.replica import CostReport, ReplicaState
from outrider.sampling.params import MAX_BAD_WORD_LEN, SamplingParams, Verification, check_entries
from outrider.sampling.structured_outputs import StructuredOutputs
from outrider.sampling.support import Support
from outrider.v1 import model_pb2, sampling_pb2

UINT16 = np.dtype("<u2")
UINT32 = np.dtype("<u4")
FLOAT32 = np.dtype("<f4")

# docs/reference/limits.md lists all limits.
# A key's name of 63 characters, a slash and a session id of 128 (orchestrator/sessions/records.py).
MAX_SESSION_ID_CHARS = 192
# Per draft position. Ours have at most 32 (`outrider.sampling.support`).
MAX_SUPPORT_IDS = 4096

# Number of entries of a message's list that are copied in about half a millisecond.
LONG_LIST = 16_384

_OPTIONAL_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "prompt_logprobs",
)

_VERIFICATIONS = {
    Verification.REJECTION: sampling_pb2.VERIFICATION_REJECTION,
    Verification.COUPLED: sampling_pb2.VERIFICATION_COUPLED,
    Verification.BLOCK: sampling_pb2.VERIFICATION_BLOCK,
}


_STATES = {
    ReplicaState.STARTING: model_pb2.REPLICA_STATE_STARTING,
    ReplicaState.READY: model_pb2.REPLICA_STATE_READY,
    ReplicaState.DRAINING: model_pb2.REPLICA_STATE_DRAINING,
    ReplicaState.STUCK: model_pb2.REPLICA_STATE_STUCK,
    ReplicaState.FAILING: model_pb2.REPLICA_STATE_FAILING,
}


def pack(values: Iterable[int] | Iterable[float] | npt.NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    """The values as little-endian bytes of `dtype`."""
    if dtype == UINT32 and isinstance(values, list | tuple):
        values = np.asarray(array("I", values))  # takes a third of numpy's time for a list
    packed = values if isinstance(values, np.ndarray) else np.array(list(values))
    return packed.astype(dtype, copy=False).tobytes()


def unpack(
    data: bytes, dtype: np.dtype[Any], field: str, most: int | None = None
) -> npt.NDArray[Any]:
    """A read-only array view of `data`, with at most `most` values.

    Raises InvalidRequest naming `field`.
    """
    if len(data) % dtype.itemsize:
        raise InvalidRequest(field, f"{len(data)} bytes; must be a multiple of {dtype.itemsize}")
    if most is not None and len(data) > most * dtype.itemsize:
        raise InvalidRequest(field, f"{len(data) // dtype.itemsize} values; at most {most}")
    return np.frombuffer(data, dtype=dtype)


# More than any vocabulary has.
MAX_RANGED_IDS = 1 << 22


def pack_ranges(ids: npt.NDArray[np.int64]) -> bytes:
    """Ascending ids as uint32 pairs: the first id of each run and the number of its ids."""
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
    sizes = np.diff(np.append(starts, len(ids)))
    return pack(np.column_stack((ids[starts], sizes)).reshape(-1), UINT32)


def unpack_ranges(data: bytes, field: str, most: int | None = None) -> npt.NDArray[np.int64]:
    """The ids of `pack_ranges`, with at most `most` runs. Raises InvalidRequest naming `field`."""
    values = unpack(data, UINT32, field, None if most is None else 2 * most).astype(np.int64)
    starts, sizes = values[0::2], values[1::2]
    if len(values) % 2 or not sizes.all() or (starts[1:] < (starts + sizes)[:-1]).any():
        raise InvalidRequest(field, "must be pairs of first id and number, ascending")
    if sizes.sum() > MAX_RANGED_IDS:
        raise InvalidRequest(field, f"{sizes.sum()} ids; at most {MAX_RANGED_IDS}")
    firsts = np.repeat(starts - np.append(0, sizes.cumsum()[:-1]), sizes)
    return np.asarray(firsts + np.arange(sizes.sum()), np.int64)


def unpack_supports(sizes: bytes, ids: bytes, probs: bytes) -> tuple[Support, ...]:
    """Supports of draft.proto's Proposal. Raises InvalidRequest if the fields are inconsistent."""
    counts = unpack(sizes, UINT16, "support_sizes").astype(np.int64)
    token_ids = unpack(ids, UINT32, "support_ids").astype(np.int64)
    weights = unpack(probs, FLOAT32, "support_probs")
    if not len(token_ids) == len(weights) == counts.sum() or not counts.all():
        raise InvalidRequest("support_sizes", "must match support_ids and support_probs")
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise InvalidRequest("support_probs", "must be finite and positive")
    ends = np.cumsum(counts)[:-1]
    parts = zip(np.split(token_ids, ends), np.split(weights, ends), strict=True)
    return tuple(Support.normalised(*part) for part in parts)


def session_id_from_proto(session_id: str) -> str:
    """The session id, checked. Raises InvalidRequest."""
    if not 1 <= len(session_id) <= MAX_SESSION_ID_CHARS:
        raise InvalidRequest(
            "session_id", f"{len(session_id)} characters; 1 to {MAX_SESSION_ID_CHARS} are allowed"
        )
    return session_id


def verification_from_proto(value: sampling_pb2.Verification) -> Verification:
    """Unset means rejection, the default. Raises InvalidRequest for an unknown number."""
    if value == sampling_pb2.VERIFICATION_UNSPECIFIED:
        return Verification.REJECTION
    for method, number in _VERIFICATIONS.items():
        if number == value:
            return method
    raise InvalidRequest(
        "verification", f"unknown value {value}; allowed: rejection, coupled, block"
    )


def verification_to_proto(value: Verification) -> sampling_pb2.Verification:
    return _VERIFICATIONS[value]


def sampling_from_proto(
    message: sampling_pb2.SamplingParams, *, default_max_tokens: int, default_seed: int
) -> SamplingParams:
    """Unset fields take their defaults. float32 fields become the shortest decimal number.

    Raises InvalidRequest for lists that are too long; `SamplingParams.validate` checks the rest.
    """
    check_entries(message)
    given: dict[str, Any] = {
        name: shortest(getattr(message, name))
        for name in _OPTIONAL_FIELDS
        if message.HasField(name)
    }
    given.setdefault("max_tokens", default_max_tokens)
    given.setdefault("seed", default_seed)
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias={token: shortest(bias) for token, bias in message.logit_bias.items()},
        allowed_token_ids=copied(message.allowed_token_ids),
        structured_outputs=(
            _structured_from_proto(message.structured_outputs)
            if message.HasField("structured_outputs")
            else None
        ),
        bad_words=tuple(message.bad_words),
        bad_words_token_ids=tuple(_sequences(message)),
    )


def _structured_from_proto(message: sampling_pb2.StructuredOutputs) -> StructuredOutputs:
    texts = {
        name: getattr(message, name)
        for name in ("json", "regex", "grammar", "structural_tag")
        if message.HasField(name)
    }
    return StructuredOutputs(**texts, json_object=message.json_object, choice=tuple(message.choice))


def _sequences(message: sampling_pb2.SamplingParams) -> Iterator[tuple[int, ...]]:
    for sequence in message.bad_words_token_ids:
        if len(sequence.ids) > MAX_BAD_WORD_LEN:  # checked before it is copied
            raise InvalidRequest(
                "sampling.bad_words_token_ids",
                f"a sequence of {len(sequence.ids)} tokens; at most {MAX_BAD_WORD_LEN}",
            )
        yield tuple(sequence.ids)


def copied(values: Sequence[int]) -> tuple[int, ...]:
    """A message's list as a tuple, copied in slices.

    A copy in one call would hold the GIL and block the event loop, 40 ms per million entries.
    """
    copy: list[int] = []
    for start in range(0, len(values), LONG_LIST):
        copy += values[start : start + LONG_LIST]
    return tuple(copy)


def shortest(value: Any) -> Any:
    """The value as tiers read it.

    0.7 sent as float32 arrives as 0.699999988; its shortest float32 decimal is 0.7."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def sampling_to_proto(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """Writes every field, so that both tiers use the same values."""
    given = {name: getattr(params, name) for name in _OPTIONAL_FIELDS}
    return sampling_pb2.SamplingParams(
        **{name: value for name, value in given.items() if value is not None},
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        logit_bias=dict(params.logit_bias),
        allowed_token_ids=params.allowed_token_ids,
        structured_outputs=(
            sampling_pb2.StructuredOutputs(**vars(params.structured_outputs))
            if params.structured_outputs is not None
            else None
        ),
        bad_words=params.bad_words,
        bad_words_token_ids=[
            sampling_pb2.TokenSequence(ids=sequence) for sequence in params.bad_words_token_ids
        ],
    )


def model_answer(model: model_pb2.ModelInfo, *, with_token_hashes: bool) -> model_pb2.ModelInfo:
    """The model info; its token hashes (hundreds of kilobytes) are included only on request."""
    if with_token_hashes or not model.token_hashes:
        return model
    answer = model_pb2.ModelInfo()
    answer.CopyFrom(model)
    answer.ClearField("token_hashes")
    return answer


def state_to_proto(state: ReplicaState) -> model_pb2.ReplicaState:
    return _STATES[state]


def costs_to_proto(report: CostReport) -> model_pb2.StepCosts:
    return model_pb2.StepCosts(
        num_tokens=report.num_tokens,
        step_s=report.step_s,
        row_s=report.row_s,
        mean_num_rows=report.mean_num_rows,
    )


def costs_from_proto(message: model_pb2.StepCosts) -> CostReport:
    """The cost report, or an empty one if the message is inconsistent."""
    sizes, seconds = tuple(message.num_tokens), tuple(message.step_s)
    rising = all(a < b for a, b in itertools.pairwise(sizes))
    numbers = (*seconds, message.row_s, message.mean_num_rows)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return CostReport()
    if not sizes or len(sizes) != len(seconds) or not rising:
        return CostReport()
    rows = max(1.0, message.mean_num_rows)
    return CostReport(sizes, seconds, message.row_s, rows)
