"""Traffic recorder: a bounded queue; records that cannot be written are dropped and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from orchestrator.generation.conversation import Turn
from orchestrator.generation.observation import GenerationObserver, ObservedRound
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.state import GenerationState
from orchestrator.generation.stop_strings import OutputText
from orchestrator.sessions import unrecorded
from orchestrator.speculation.verification import Proposal, VerifyResult
from orchestrator.traffic.record import MAX_TOKENS, ModelNames, read_records
from orchestrator.traffic.recorder import TrafficRecorder
from outrider.sampling.params import SamplingParams, Verification
from outrider.settings.observation import ObservationSettings

_PARAMS = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)


def _recorder(directory: Path) -> TrafficRecorder:
    settings = ObservationSettings(traffic_dir=str(directory), traffic_share=1.0)
    return TrafficRecorder(settings, lambda: ModelNames("model", "tokenizer"))


def _prepared(prompt: list[int], *eos: int) -> PreparedTurn:
    request = GenerationRequest(
        None, tuple(prompt), None, _PARAMS, None, Verification.REJECTION, None, 4, 1, 1, None, False
    )
    text = OutputText(None, prompt, ())
    state = GenerationState(prompt, _PARAMS, Verification.REJECTION, eos, text)
    return PreparedTurn(request, Turn(prompt, 0, ()), state, "{}")


def _round(state: GenerationState, *samples: int, drafts: tuple[int, ...] = ()) -> ObservedRound:
    """Commits a greedy round to the state; each position's best token is its sample."""
    base_len = state.committed_len
    nothing = np.zeros(0)
    top = np.array(samples)[:, None]
    result = VerifyResult(
        samples, (), nothing, nothing,
        sample_logprobs=np.zeros(len(samples), np.float32), top_ids=top,
        top_logprobs=np.full(top.shape, -0.12345678, np.float32),
    )  # fmt: skip
    proposal = Proposal(base_len, drafts, None) if drafts else None
    state.commit(proposal, result)
    assert state.outcome is not None
    return ObservedRound(base_len, proposal, result, state.outcome, "replica")


def _observer(recorder: TrafficRecorder, prepared: PreparedTurn) -> GenerationObserver:
    (observer,) = recorder.observers(prepared, unrecorded("s", "model", ""))
    return observer


async def test_tokens_after_a_stop_are_not_recorded(tmp_path: Path) -> None:
    """The round's own end is beyond the output's."""
    recorder = _recorder(tmp_path)
    prepared = _prepared([1, 2], 9)
    async with recorder.running():
        observer = _observer(recorder, prepared)
        observer.observe(_round(prepared.state, 5))
        observer.observe(_round(prepared.state, 6, 9, 7, drafts=(6, 9)))
        observer.ended(prepared.state)
    (record,) = read_records(tmp_path)
    assert record["output_token_ids"] == [5, 6, 9]
    assert record["draft_token_ids"] == [None, 6, 9]
    assert record["top_token_ids"] == [[5], [6], [9]]
    assert record["top_logprobs"] == [[-0.1235]] * 3
    assert record["finish"] == "stop"


async def test_a_long_prompt_is_cut_at_its_start(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path)
    prepared = _prepared(list(range(MAX_TOKENS + 10)))
    async with recorder.running():
        observer = _observer(recorder, prepared)
        observer.observe(_round(prepared.state, 5))
        observer.ended(prepared.state)
    (record,) = read_records(tmp_path)
    assert record["num_cut"] == 11
    assert record["prompt_token_ids"] == list(range(11, MAX_TOKENS + 10))
    assert record["finish"] is None


async def test_records_are_dropped_and_counted_when_too_many_wait(tmp_path: Path) -> None:
    """Nobody writes before `running`."""
    recorder = _recorder(tmp_path)
    num = 100
    for _ in range(num):
        prepared = _prepared([1])
        observer = _observer(recorder, prepared)
        observer.observe(_round(prepared.state, 5))
        observer.ended(prepared.state)
    num_dropped = recorder.records["dropped"]
    assert 0 < num_dropped < num
    async with recorder.running():
        pass
    assert recorder.records["written"] == num - num_dropped == len(list(read_records(tmp_path)))


async def test_a_directory_that_vanishes_costs_records_only(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path / "traffic")
    shutil.rmtree(tmp_path / "traffic")
    prepared = _prepared([1])
    async with recorder.running():
        observer = _observer(recorder, prepared)
        observer.observe(_round(prepared.state, 5))
        observer.ended(prepared.state)
    assert recorder.records == {"written": 0, "dropped": 1}


def test_another_format_is_refused(tmp_path: Path) -> None:
    line = json.dumps({"format": "outrider-traffic/2"}) + "\n"
    (tmp_path / "traffic-1.jsonl").write_text(line)
    with pytest.raises(ValueError, match="outrider-traffic/1"):
        list(read_records(tmp_path))
