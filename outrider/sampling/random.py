"""Counter-based randomness: uniforms are a function of (seed, purpose, position, base, token).

Integer arithmetic modulo 2**64 (SplitMix64, Steele et al. 2014) and one conversion at the end give
the same number in Python, numpy and torch, on any device. There is no generator and no state, so
samples do not depend on batch, slot, round or timing.

The target's noise (`Purpose.TARGET`; recovered tokens included) is keyed by the position only. So
with `coupled` verification the output is a function of the seed. A block's own uniforms (draft,
accept) are keyed by the block's start (`base_len`) as well. The number of accepted tokens depends
on the uniforms of later positions (in block verification always), and the next block covers some
of those positions: it must not use the same uniforms again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

# A numpy array or a torch tensor.
Array = Any

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """Purpose of a uniform; different purposes are independent."""

    TARGET = 1
    DRAFT = 2
    ACCEPT = 3


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def stream_key(seed: int, purpose: Purpose, position: int, base_len: int = 0) -> int:
    """Key of one position's uniforms, a signed 64-bit integer.

    `seed`: any 64-bit unsigned integer. `position`: index of the token in the context.
    `base_len`: context length at which the block of draft tokens starts; 0 for the target.
    """
    key = seed & _MASK
    for part in (int(purpose), position, base_len):
        key = _mix(key + _GOLDEN * (part + 1))
    return _signed(key)


def uniform(key: int) -> float:
    """The key's first uniform, in (0, 1). It has 52 bits: with 53, adding 0.5 could round to 1."""
    return ((_mix(key + _GOLDEN) >> 12) + 0.5) * 2.0**-52


def stream_keys(
    seeds: npt.ArrayLike, purpose: Purpose, positions: npt.ArrayLike, base_lens: npt.ArrayLike = 0
) -> npt.NDArray[np.int64]:
    """`stream_key` for arrays of seeds, positions and base lengths, which are broadcast."""
    keys = np.atleast_1d(np.asarray(seeds, np.uint64)).astype(np.int64)
    for part in (int(purpose), positions, base_lens):
        keys = keys + token_offsets(np.atleast_1d(np.asarray(part, np.int64)))
        scramble(keys)
        keys ^= (keys >> 31) & (_MASK >> 31)
    return keys


def uniforms(
    seed: int, purpose: Purpose, positions: Sequence[int], base_len: int
) -> npt.NDArray[np.float64]:
    """One uniform per position, float64 [len(positions)]."""
    return np.array([uniform(stream_key(seed, purpose, p, base_len)) for p in positions])


def scramble(bits: Array, last_factor: int = _MIX_2) -> None:
    """SplitMix64's finaliser on 64-bit integers, in place, without its last step.

    The missing step, `bits ^= bits >>> 31`, does not change the upper 31 bits.
    """
    is_signed = bits.dtype != np.uint64
    for shift, factor in ((30, _MIX_1), (27, last_factor)):
        shifted = bits >> shift
        if is_signed:  # an arithmetic shift; the mask makes it logical
            shifted &= _MASK >> shift
        bits ^= shifted
        bits *= _signed(factor) if is_signed else factor & _MASK


def token_offsets(token_ids: Array) -> Array:
    """Offset of each token: scrambling (key + offset) gives the token's bits."""
    return (token_ids + 1) * _signed(_GOLDEN)


def token_uniforms(keys: Array, token_ids: Array) -> Array:
    """float64 [num_keys, num_tokens] in (0, 1), from int64 [num_keys] and int64 [num_tokens].

    With `token_ids` [num_keys, num_tokens], each key has its own tokens. Token 0's uniform is
    `uniform(key)`.
    """
    bits = keys[:, None] + token_offsets(token_ids)
    scramble(bits)
    bits ^= (bits >> 31) & (_MASK >> 31)
    xp = array_namespace(bits)
    mantissa = xp.astype((bits >> 12) & (_MASK >> 12), xp.float64)
    return (mantissa + 0.5) * 2.0**-52


def token_bounds(keys: Array, offsets: Array) -> Array:
    """Float32 v with 0 < v <= -log u, for the tokens' uniforms u; [num_keys, num_tokens].

    `offsets` from `token_offsets`. v is 1 - u, which is less than -log u, and close to it where the
    noise is large. So -log v is an upper bound of the Gumbel noise: one logarithm in single
    precision finds the tokens that can win. Without the last step of `scramble`, 1 - u is known
    only to 2**-31; twice that is subtracted.
    """
    bits = keys[:, None] + offsets
    is_numpy = isinstance(bits, np.ndarray)
    if is_numpy:  # its shifts of unsigned integers are logical: fewer operations
        bits = bits.view(np.uint64)
    scramble(bits, -_MIX_2)  # complement: -u modulo 1
    bits >>= 1
    if is_numpy:
        bits = bits.view(np.int64)
    else:
        bits &= _MASK >> 1
    xp = array_namespace(bits)
    values = xp.astype(bits, xp.float32)
    values -= 2.0**33
    values *= 2.0**-63
    return values.clip(2.0**-54, 1.0)  # the method of both; the namespace's clip is slower


def token_gumbels(keys: Array, token_ids: Array) -> Array:
    """Standard Gumbel noise, float64 [num_keys, num_tokens]; argmax(log p + noise) ~ p."""
    values = token_uniforms(keys, token_ids)
    xp = array_namespace(values)
    return -xp.log(-xp.log(values))


def target_gumbels(seed: int, position: int, token_ids: Array) -> Array:
    """The target's Gumbel noise for tokens at one position, float64 [num_tokens]."""
    key = stream_key(seed, Purpose.TARGET, position)
    return token_gumbels(np.array([key]), token_ids)[0]
