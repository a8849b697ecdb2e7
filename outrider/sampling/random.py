"""Counter-based randomness: a uniform is a pure function of (seed, purpose, position, base, token).

Integer arithmetic modulo 2**64 (SplitMix64, Steele et al. 2014) and one conversion at the end make
it the same number in Python, numpy and torch, on any device. There is no generator and no state,
so no draw depends on batch, slot, round or timing. It knows nothing of distributions.

What belongs to the target (`Purpose.TARGET`) is keyed by the position alone: with `coupled`
verification the output is then a function of the seed. What belongs to a block of draft tokens is
keyed by the block's start (`base_len`) as well: how many tokens of a block stand says something
about the uniforms of its later positions (always so in block verification), so that the next
block, which covers some of the same positions, must not see them again.
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
    RECOVER = 4


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


def uniforms(
    seed: int, purpose: Purpose, positions: Sequence[int], base_len: int
) -> npt.NDArray[np.float64]:
    """One uniform for each position: float64 [len(positions)]."""
    return np.array([uniform(stream_key(seed, purpose, p, base_len)) for p in positions])


def token_uniforms(keys: Array, token_ids: Array) -> Array:
    """float64 [num_keys, num_tokens] in (0, 1), from int64 [num_keys] and int64 [num_tokens].

    Token 0's uniform is `uniform(key)`.
    """
    bits = keys[:, None] + (token_ids[None, :] + 1) * _signed(_GOLDEN)
    # `>>` of a signed integer repeats the sign: the mask makes it a logical shift.
    bits = (bits ^ ((bits >> 30) & (_MASK >> 30))) * _signed(_MIX_1)
    bits = (bits ^ ((bits >> 27) & (_MASK >> 27))) * _signed(_MIX_2)
    bits = bits ^ ((bits >> 31) & (_MASK >> 31))
    xp = array_namespace(bits)
    mantissa = xp.astype((bits >> 12) & (_MASK >> 12), xp.float64)
    return (mantissa + 0.5) * 2.0**-52


def token_gumbels(keys: Array, token_ids: Array) -> Array:
    """Standard Gumbel noise, float64 [num_keys, num_tokens]; argmax(log p + noise) ~ p."""
    values = token_uniforms(keys, token_ids)
    xp = array_namespace(values)
    return -xp.log(-xp.log(values))
