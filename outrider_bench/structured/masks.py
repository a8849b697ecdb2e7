"""Outputs in a format, replayed in this process: is each a valid beginning, and what masks cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from outrider.errors import ConfigError, InvalidRequest
from outrider.grammar import GrammarState, grammar_compiler
from outrider.model_server.grammar_masks import MaskRequest, MaskThread
from outrider.quickstart_pair import TARGET_PATH
from outrider.tokenizer import Tokenizer
from outrider_bench.structured.cases import CaseResult

# Positions of a verify request: four draft tokens and the bonus token.
_BLOCK = 5


def replayed(
    target: str | None, results: Sequence[CaseResult]
) -> tuple[list[CaseResult], dict[str, Any]]:
    """The results, with a problem where a token is not allowed, and the times.

    Each state walks its output once, in blocks, as at a target. Times are microseconds per position
    and milliseconds per compilation. Raises ConfigError.
    """
    tokenizer = Tokenizer.load(target or str(TARGET_PATH))
    compiler = grammar_compiler(tokenizer)
    if tokenizer is None or compiler is None:
        raise ConfigError("--target: has no tokenizer of which grammars can be made")
    thread = MaskThread()
    checked: list[CaseResult] = []
    compile_ms: list[float] = []
    mask_us: list[float] = []
    for result in results:
        began_at = time.perf_counter()
        grammar = compiler.submit(result.case.structured).result()
        compile_ms.append(1e3 * (time.perf_counter() - began_at))
        # The model's EOS, which ends the output, need not be the tokenizer's.
        has_eos = result.finish_reason == "stop"
        ids = np.array(result.token_ids[: -1 if has_eos else None], np.int64)
        state = GrammarState(grammar, [])
        for start in range(0, len(ids) - _BLOCK, _BLOCK):
            began_at = time.perf_counter()
            masks = thread.start([MaskRequest(state, ids[: start + _BLOCK], start, _BLOCK)])
            if isinstance(masks.result()[0], InvalidRequest):
                break
            mask_us.append(1e6 * (time.perf_counter() - began_at) / _BLOCK)
        is_allowed = state.seek(ids) == len(ids)
        why = "" if is_allowed else "a token is not allowed by the format"
        checked.append(replace(result, problem=result.problem or why))
    return checked, {
        "num_blocks": len(mask_us),
        "mask_us_median": statistics.median(mask_us) if mask_us else None,
        "mask_us_p99": float(np.quantile(mask_us, 0.99)) if mask_us else None,
        "compile_ms_median": statistics.median(compile_ms),
        "compile_ms_max": max(compile_ms),
    }
