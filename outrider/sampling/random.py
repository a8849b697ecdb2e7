"""Counter-based randomness: a uniform is a pure function of (seed, purpose, position, base, token).

Integer arithmetic modulo 2**64 (SplitMix64, Steele et al. 2014) and one conversion at the end make
it the same number in Python, numpy and torch, on any device. There is no generator and no state,
so no draw depends on batch, slot, round or timing. It knows nothing of distributions.

What belongs to the target (`Purpose.TARGET`: its draws, recovered tokens included) is keyed by the
position alone: with `coupled` verification the output is then a function of the seed. What belongs
to a block of draft tokens is keyed by the block's start (`base_len`) as well: how many tokens of a
block stand says something about the uniforms of its later positions (always so in block
verification), so that the next block, which covers some of the same positions, must not see them
again.
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
    """What a uniform is for; different purposes are independent."""

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
    """The key of one position's uniforms, a signed 64-bit integer.

    `seed`: any 64-bit unsigned integer. `position`: index of the token in the context.
    `base_len`: committed length at which the block of draft tokens starts; 0 for the target's own.
    """
    key = seed & _MASK
    for part in (int(purpose), position, base_len):
        key = _mix(key + _GOLDEN * (part + 1))
    return _signed(key)


def uniform(key: int) -> float:
    """The key's first uniform, in (0, 1), with 52 bits: a half added to 53 would round up to 1."""
    return ((_mix(key + _GOLDEN) >> 12) + 0.5) * 2.0**-52


def stream_keys(
    seeds: npt.ArrayLike, purpose: Purpose, positions: npt.ArrayLike, base_lens: npt.ArrayLike = 0
) -> npt.NDArray[np.int64]:
    """`stream_key` of many seeds, positions and base lengths that broadcast together."""
    keys = np.atleast_1d(np.asarray(seeds, np.uint64)).astype(np.int64)
    for part in (int(purpose), positions, base_lens):
        keys = keys + token_offsets(np.atleast_1d(np.asarray(part, np.int64)))
        scramble(keys)
        keys ^= (keys >> 31) & (_MASK >> 31)
    return keys


def uniforms(
    seed: int, purpose: Purpose, positions: Sequence[int], base_len: int
) -> npt.NDArray[np.float64]:
    """One uniform for each position: float64 [len(positions)]."""
    return np.array([uniform(stream_key(seed, purpose, p, base_len)) for p in positions])


def scramble(bits: Array, last_factor: int = _MIX_2) -> None:
    """SplitMix64's finaliser on 64-bit integers, in place, without its last step.

    That step, `bits ^= bits >>> 31`, leaves the upper 31 bits as they are here.
    """
    is_signed = bits.dtype != np.uint64
    for shift, factor in ((30, _MIX_1), (27, last_factor)):
        shifted = bits >> shift
        if is_signed:  # it repeats the sign: the mask makes it a logical shift
            shifted &= _MASK >> shift
        bits ^= shifted
        bits *= _signed(factor) if is_signed else factor & _MASK


def token_offsets(token_ids: Array) -> Array:
    """What a key is shifted by for each token: the key's sum with it is to be scrambled."""
    return (token_ids + 1) * _signed(_GOLDEN)


def token_uniforms(keys: Array, token_ids: Array) -> Array:
    """float64 [num_keys, num_tokens] in (0, 1), from int64 [num_keys] and int64 [num_tokens].

    `token_ids` [num_keys, num_tokens]: tokens of its own for each key. Token 0's uniform is
    `uniform(key)`.
    """
    bits = keys[:, None] + token_offsets(token_ids)
    scramble(bits)
    bits ^= (bits >> 31) & (_MASK >> 31)
    xp = array_namespace(bits)
    mantissa = xp.astype((bits >> 12) & (_MASK >> 12), xp.float64)
    return (mantissa + 0.5) * 2.0**-52


def token_bounds(keys: Array, offsets: Array) -> Array:
    """Float32 v with 0 < v <= -log u, u being the tokens' uniforms; [num_keys, num_tokens].

    `offsets` from `token_offsets`. v is 1 - u, which is less than -log u and near it where the
    noise is large. So -log v bounds the Gumbel noise from above: who can win at all is found with
    one logarithm in single precision. For want of the last step 1 - u is only known to 2**-31,
    which is deducted twice.
    """
    bits = keys[:, None] + offsets
    is_numpy = isinstance(bits, np.ndarray)
    if is_numpy:  # numpy's shifts of unsigned integers are logical: fewer steps
        bits = bits.view(np.uint64)
    scramble(bits, -_MIX_2)  # the complement: -u modulo 1
    bits >>= 1
    if is_numpy:
        bits = bits.view(np.int64)
    else:
        bits &= _MASK >> 1
    xp = array_namespace(bits)
    values = xp.astype(bits, xp.float32)
    values -= 2.0**33
    values *= 2.0**-63
    return values.clip(2.0**-54, 1.0)  # a method of both: the namespace's takes a dozen checks


def token_gumbels(keys: Array, token_ids: Array) -> Array:
    """Standard Gumbel noise, float64 [num_keys, num_tokens]; argmax(log p + noise) ~ p."""
    values = token_uniforms(keys, token_ids)
    xp = array_namespace(values)
    return -xp.log(-xp.log(values))


def target_gumbels(seed: int, position: int, token_ids: Array) -> Array:
    """The target's noise of some tokens at one position, float64 [num_tokens]."""
    key = stream_key(seed, Purpose.TARGET, position)
    return token_gumbels(np.array([key]), token_ids)[0]
