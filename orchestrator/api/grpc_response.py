"""Translation of the orchestrator's plain values to protobuf responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from orchestrator.audit.auditor import Auditor
from orchestrator.audit.report import Failure
from orchestrator.audit.sampled_tests import PERIOD_S, SampledTests, SequentialTest
from orchestrator.generation.counts import DraftCounts
from orchestrator.generation.output import Chunk, Result
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.state import EmittedToken, FinishReason, TokenOrigin
from orchestrator.replicas.pairing import DraftMatch
from orchestrator.replicas.rollout import DraftRollout
from orchestrator.sessions import KvHandle, SessionPage, SessionRecord
from orchestrator.speculation.gamma import GammaDecision
from orchestrator.speculation.verification import PromptLogprobs, SourceName
from outrider.draft_rollout import AcceptanceSums, revision_name
from outrider.errors import ConfigError
from outrider.runtime.protobuf import verification_to_proto
from outrider.v1 import model_pb2, orchestrator_pb2

_ORIGINS = {
    TokenOrigin.ACCEPTED: orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED,
    TokenOrigin.RECOVERED: orchestrator_pb2.TOKEN_ORIGIN_RECOVERED,
    TokenOrigin.BONUS: orchestrator_pb2.TOKEN_ORIGIN_BONUS,
    TokenOrigin.PLAIN: orchestrator_pb2.TOKEN_ORIGIN_PLAIN,
    TokenOrigin.REPLAYED: orchestrator_pb2.TOKEN_ORIGIN_UNSPECIFIED,
}
_FINISH_REASONS = {
    FinishReason.STOP: orchestrator_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: orchestrator_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: orchestrator_pb2.FINISH_REASON_CANCELLED,
}


def pairing_response(
    match: DraftMatch | None, refused: Sequence[ConfigError]
) -> orchestrator_pb2.DraftPairing | None:
    """Pairing of draft and target; None before a draft connects.

    `refused`: errors of the draft replicas that are refused now.
    """
    if match is None and not refused:
        return None
    return orchestrator_pb2.DraftPairing(
        num_differing_ids=match.num_differing_ids if match else 0,
        is_assumed=match is not None and match.is_assumed,
        is_reencoded=match is not None and match.is_reencoded,
        refused=str(refused[-1]) if refused else "",
    )


def rollout_response(
    rollout: DraftRollout, models: Sequence[model_pb2.ModelInfo]
) -> orchestrator_pb2.DraftRollout:
    """`models`: of the connected draft replicas."""
    record, num_replicas = rollout.record, rollout.num_replicas()
    names = {revision_name(model.model_fingerprint): model.name for model in models}
    revisions = dict.fromkeys((*record.revisions, *sorted(num_replicas)))
    message = orchestrator_pb2.DraftRollout(version=record.version, decision=record.decision)
    for revision in revisions:
        sums = rollout.sums.get(revision, AcceptanceSums())
        message.revisions.add(
            revision=revision,
            model=names.get(revision, ""),
            role=orchestrator_pb2.DraftRole.Value(f"DRAFT_ROLE_{record.role(revision).name}"),
            num_replicas=num_replicas.get(revision, 0),
            num_generations=sums.num,
            acceptance_rate=sums.mean if sums.num else None,
        )
    return message


def generate_response(
    chunk: Chunk, session_id: str, request: GenerationRequest
) -> orchestrator_pb2.GenerateResponse:
    """`request`: the request as it ran, with the server's defaults."""
    return orchestrator_pb2.GenerateResponse(
        session_id=session_id,
        token_ids=[token.token_id for token in chunk.tokens],
        text=chunk.text,
        text_ends=chunk.text_ends,
        origins=[_ORIGINS[token.origin] for token in chunk.tokens],
        logprobs=[_logprobs(token) for token in chunk.tokens if token.logprobs is not None],
        result=_result(chunk.result, request) if chunk.result else None,
        prompt_logprobs=_prompt_logprobs(chunk.prompt_logprobs) if chunk.prompt_logprobs else None,
    )


def _prompt_logprobs(prompt: PromptLogprobs) -> orchestrator_pb2.PromptLogprobs:
    return orchestrator_pb2.PromptLogprobs(
        token_ids=prompt.token_ids,
        logprobs=prompt.logprobs.tolist(),
        num_top=prompt.top_ids.shape[-1],
        top_ids=prompt.top_ids.reshape(-1).tolist(),
        top_logprobs=prompt.top_logprobs.reshape(-1).tolist(),
        ranks=prompt.ranks.tolist(),
    )


def _logprobs(token: EmittedToken) -> orchestrator_pb2.TokenLogprobs:
    assert token.logprobs is not None, "the caller has checked it"
    return orchestrator_pb2.TokenLogprobs(
        logprob=token.logprobs.logprob,
        top_ids=token.logprobs.top_ids,
        top_logprobs=token.logprobs.top_logprobs,
    )


def _result(result: Result, request: GenerationRequest) -> orchestrator_pb2.GenerateResult:
    finish, counts = result.finish, result.counts
    return orchestrator_pb2.GenerateResult(
        finish_reason=_FINISH_REASONS[finish.reason],
        stop_text=finish.stop_text,
        stop_token_id=finish.stop_token_id,
        eos_token_id=finish.eos_token_id,
        usage=orchestrator_pb2.Usage(
            prompt_tokens=result.num_prompt_tokens,
            completion_tokens=result.num_completion_tokens,
            cached_tokens=result.num_cached_tokens,
        ),
        speculation=orchestrator_pb2.SpeculationStats(
            num_drafts=counts.num_drafts,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            num_accepted_tokens_per_pos=counts.num_accepted_per_pos,
            num_rejected_tokens=counts.num_rejected_tokens,
            acceptance_rate=counts.acceptance_rate,
            mean_acceptance_length=counts.mean_acceptance_length,
            num_rounds=counts.num_rounds,
            time_to_first_token_s=result.time_to_first_token_s,
            duration_s=result.duration_s,
            tokens_per_s=result.tokens_per_s,
            gamma=request.gamma,
            verification=verification_to_proto(request.verification),
            draft_wire_bytes=result.draft_wire_bytes,
            target_wire_bytes=result.target_wire_bytes,
            num_lookahead_hits=result.num_lookahead_hits,
            num_rounds_per_gamma=counts.num_rounds_per_gamma,
            target_step_s=result.target_step_s,
            verify_s=result.verify_s,
            draft_wait_s=result.draft_wait_s,
            decision=_decision(result.decision) if result.decision else None,
            sources=_sources(result),
        ),
        seed=request.params.seed,
        recorded=result.recorded,
        interrupted_answer_tokens=result.num_interrupted_tokens,
    )


def _sources(result: Result) -> Iterator[orchestrator_pb2.SourceStats]:
    """Statistics of the sources that were chosen or whose draft tokens were verified."""
    by_source, expected = result.counts.by_source, result.expected_tokens_per_s
    chosen = {source for source, _ in result.choices}
    for source in SourceName:
        if source not in chosen and source not in by_source:
            continue
        counts = by_source.get(source, DraftCounts())
        yield orchestrator_pb2.SourceStats(
            source=f"DRAFT_SOURCE_{source.name}",
            num_rounds_by_reason={
                reason: num for (name, reason), num in result.choices.items() if name == source
            },
            num_drafts=counts.num_drafts,
            num_draft_tokens=counts.num_draft_tokens,
            num_accepted_tokens=counts.num_accepted_tokens,
            num_rejected_tokens=counts.num_rejected_tokens,
            acceptance_rate=counts.acceptance_rate,
            expected_tokens_per_s=expected.get(source),
        )


def _decision(decision: GammaDecision) -> orchestrator_pb2.GammaDecision:
    values = asdict(decision)
    del values["wait_s"]
    return orchestrator_pb2.GammaDecision(**values)


def sessions_response(page: SessionPage) -> orchestrator_pb2.ListSessionsResponse:
    return orchestrator_pb2.ListSessionsResponse(
        sessions=[orchestrator_pb2.SessionSummary(**asdict(summary)) for summary in page.sessions],
        next_page_token=str(page.cursor) if page.cursor else "",
        num_unreadable=page.num_unreadable,
    )


def session_response(record: SessionRecord) -> orchestrator_pb2.GetSessionResponse:
    return orchestrator_pb2.GetSessionResponse(
        session_id=record.session_id,
        token_ids=record.token_ids.tolist(),
        in_use=record.in_use,
        epoch=record.epoch,
        num_turns=record.num_turns,
        num_drafts=record.counters.num_drafts,
        num_draft_tokens=record.counters.num_draft_tokens,
        num_accepted_tokens=record.counters.num_accepted_tokens,
        num_emitted_tokens=record.counters.num_emitted_tokens,
        target_kv=_kv(record.target_kv),
        draft_kv=_kv(record.draft_kv),
        expires_in_s=record.expires_in_s,
    )


def _kv(handle: KvHandle | None) -> orchestrator_pb2.KvHandle | None:
    if handle is None:
        return None
    return orchestrator_pb2.KvHandle(
        replica=handle.replica, epoch=handle.epoch, cached_len=handle.cached_len
    )


def audit_response(auditor: Auditor, client: str) -> orchestrator_pb2.GetAuditResponse:
    """Results of the audit. Failures are those of the client's own sessions, latest first."""
    report, tests = auditor.report, auditor.tests
    return orchestrator_pb2.GetAuditResponse(
        share=auditor.share,
        tolerance=auditor.tolerance,
        num_generations=report.generations,
        num_dropped=report.dropped,
        num_tokens=report.num_positions,
        num_near_ties=report.num_near_ties,
        max_gap=report.max_gap,
        tests=[_audit_test(test, tests) for test in tests.tests.values()],
        failures=[
            _audit_failure(failure)
            for failure in reversed(report.failures)
            if failure.client == client
        ],
        planted_bias=auditor.planted_bias,
    )


def _audit_test(test: SequentialTest, tests: SampledTests) -> orchestrator_pb2.AuditTest:
    return orchestrator_pb2.AuditTest(
        name=test.name,
        num_trials=test.num_trials,
        age_s=tests.age_s,
        observed=test.observed,
        expected=test.expected,
        log_evidence=test.evidence.log_evidence,
        max_log_evidence=test.evidence.max_log_evidence,
        alarm_log_evidence=test.alarm_at,
        num_alarms=test.num_alarms,
        false_alarm_probability=tests.false_alarm_probability / len(tests.tests),
        period_s=PERIOD_S,
        expected_trials=test.expected_trials,
    )


def _audit_failure(failure: Failure) -> orchestrator_pb2.AuditFailure:
    return orchestrator_pb2.AuditFailure(
        time_s=failure.time,
        session_id=failure.session_id,
        verification=failure.verification,
        index=failure.index,
        prompt_len=failure.prompt_len,
        gap=failure.gap,
        num_differing_tokens=failure.num_divergences,
        replicas=failure.replicas,
        rerun_replica=failure.rerun_replica,
        token_id=failure.token_id,
        expected_id=failure.expected_id,
    )
