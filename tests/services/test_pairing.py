"""A draft is used where its token ids mean what the target's do; otherwise all runs without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import structlog.testing
import tokenizers

from outrider.errors import ConfigError
from outrider.v1 import draft_pb2, orchestrator_pb2
from tests.services.parts import GREEDY, Greedy, Pair, System, both_tiers, orchestrating
from tests.services.tokenizer_files import write_tokenizer
from tests.telemetry.parts import Scrape, get

PROMPT = [7, 8, 9, 10]
NUM_TOKENS = 12
Info = orchestrator_pb2.GetModelInfoResponse


def draft_with(pair: Pair, directory: Path, *added: str, corpus: str = "the quick fox") -> Pair:
    """The pair, its draft's tokenizer trained on `corpus`, with these tokens added."""
    shutil.copytree(pair.draft, directory)
    write_tokenizer(directory, corpus=corpus)
    path = directory / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(list(added))
    backend.save(str(path))
    return Pair(pair.target, directory)


async def model_info(system: System) -> Info:
    info: Info = await system.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
    return info


async def outcome(system: System, greedy: Greedy) -> tuple[Info, bool]:
    """What GetModelInfo says, and whether drafts were used; the output is the target's own."""
    output = await system.generate(PROMPT, sampling={**GREEDY, "max_tokens": NUM_TOKENS}, gamma=3)
    assert output.token_ids == greedy(PROMPT, NUM_TOKENS)
    return await model_info(system), output.speculation.num_draft_tokens > 0


async def test_tokens_added_to_one_of_them_are_counted(
    chat_pair: Pair, chat_greedy: Greedy, tmp_path: Path, redis_url: str
) -> None:
    """The bug: one added token, and the orchestrator refused to start."""
    pair = draft_with(chat_pair, tmp_path / "draft", "<think>", "</think>")
    with structlog.testing.capture_logs() as logs:
        async with (
            both_tiers(pair) as tiers,
            orchestrating(tiers, redis_url, tokenizer=str(pair.target)) as system,
        ):
            info, has_drafts = await outcome(system, chat_greedy)
    assert has_drafts
    assert info.draft_pairing == orchestrator_pb2.DraftPairing(num_differing_ids=2)
    (warning,) = [entry for entry in logs if entry["event"] == "draft_vocabulary_differs"]
    assert (warning["log_level"], warning["num_ids"]) == ("warning", 2)


async def test_an_equal_vocabulary_differs_in_nothing(
    chat_pair: Pair, chat_greedy: Greedy, redis_url: str
) -> None:
    settings = {"assume_same_vocabulary": False}
    async with (
        both_tiers(chat_pair) as tiers,
        orchestrating(tiers, redis_url, **settings) as system,
    ):
        info, has_drafts = await outcome(system, chat_greedy)
        assert has_drafts
        assert info.HasField("draft_pairing")
        assert info.draft_pairing == orchestrator_pb2.DraftPairing()
        # Hundreds of kilobytes where the model is large: only for who asks.
        assert not info.draft.token_hashes
        assert not info.target.token_hashes
        assert system.draft is not None
        asked = draft_pb2.DraftServiceGetModelInfoRequest(with_token_hashes=True)
        hashes = (await system.draft.GetModelInfo(asked)).model.token_hashes
        backend = tokenizers.Tokenizer.from_file(str(chat_pair.draft / "tokenizer.json"))
        assert len(hashes) == 4 * backend.get_vocab_size()


async def test_an_unrelated_draft_is_refused_and_nothing_else(
    chat_pair: Pair, chat_greedy: Greedy, tmp_path: Path, redis_url: str
) -> None:
    """Also with `assume_same_vocabulary`, which is for models without tokenizers."""
    pair = draft_with(chat_pair, tmp_path / "draft", corpus="zebras quiz quotes")
    with structlog.testing.capture_logs() as logs:
        async with (
            both_tiers(pair) as tiers,
            orchestrating(tiers, redis_url, metrics_port=0) as system,
        ):
            info, has_drafts = await outcome(system, chat_greedy)
            scraped = Scrape(await get(system.metrics_port))
    assert not has_drafts
    assert not info.HasField("draft")
    assert scraped("outrider_replicas", tier="draft", state="refused") == 1
    assert "do not share a vocabulary" in info.draft_pairing.refused
    (error,) = [entry for entry in logs if entry["event"] == "replica_refused"]
    assert error["why"] == info.draft_pairing.refused
    assert "serving_without_draft" in [entry["event"] for entry in logs]


@pytest.mark.parametrize("without", ["both", "target", "draft"])
async def test_models_without_a_tokenizer_are_paired_where_it_is_said(
    without: str, chat_pair: Pair, chat_greedy: Greedy, tmp_path: Path, redis_url: str
) -> None:
    """The bug: two models without tokenizers were paired, whatever they were."""
    directories = []
    for name in Pair._fields:
        directory = tmp_path / name
        shutil.copytree(getattr(chat_pair, name), directory)
        if without in ("both", name):
            (directory / "tokenizer.json").unlink()
        directories.append(directory)
    async with both_tiers(Pair(*directories)) as tiers:
        async with orchestrating(tiers, redis_url, assume_same_vocabulary=False) as system:
            info, has_drafts = await outcome(system, chat_greedy)
            assert not has_drafts
            assert "has no tokenizer" in info.draft_pairing.refused
            assert "--assume-same-vocabulary" in info.draft_pairing.refused
        async with orchestrating(tiers, redis_url, assume_same_vocabulary=True) as system:
            info, has_drafts = await outcome(system, chat_greedy)
            assert has_drafts
            assert info.draft_pairing == orchestrator_pb2.DraftPairing(is_assumed=True)


async def test_the_orchestrators_own_tokenizer(
    chat_pair: Pair, tmp_path: Path, redis_url: str
) -> None:
    """Text is the orchestrator's business: no id may mean something else to the target."""
    lacking = draft_with(chat_pair, tmp_path / "lacking").draft
    extended = draft_with(chat_pair, tmp_path / "extended", "<think>").draft
    renamed = draft_with(chat_pair, tmp_path / "renamed").draft
    path = renamed / "tokenizer.json"
    told = json.loads(path.read_text("utf-8"))
    told["added_tokens"][0]["content"] = "<begin>"
    told["model"]["vocab"] = {
        "<begin>" if token == "<s>" else token: i for token, i in told["model"]["vocab"].items()
    }
    path.write_text(json.dumps(told), "utf-8")
    async with both_tiers(chat_pair, draft_kv=None) as tiers:
        for tokenizer in (lacking, extended):
            async with orchestrating(tiers, redis_url, tokenizer=str(tokenizer)) as system:
                output = await system.generate("the quick", sampling={**GREEDY, "max_tokens": 4})
                assert len(output.token_ids) == 4
        with pytest.RaisesGroup(
            pytest.RaisesExc(ConfigError, match="1 token ids differ"), flatten_subgroups=True
        ):
            async with orchestrating(tiers, redis_url, tokenizer=str(renamed)):
                pass


async def test_a_draft_with_another_tokenizer_reencodes_where_it_has_the_targets(
    chat_pair: Pair, chat_greedy: Greedy, tmp_path: Path, redis_url: str
) -> None:
    """The output is the target's own. Without --target-tokenizer the draft is refused."""
    pair = draft_with(chat_pair, tmp_path / "draft", corpus="zebras quiz quotes")
    for tokenizer in (None, f"{pair.draft},{pair.target}"):
        async with (
            both_tiers(pair, draft_settings={"target_tokenizer": tokenizer}) as tiers,
            orchestrating(tiers, redis_url, assume_same_vocabulary=False) as system,
        ):
            info, _ = await outcome(system, chat_greedy)
            pairing = info.draft_pairing
            assert pairing.is_reencoded == (tokenizer is not None)
            assert ("--target-tokenizer" in pairing.refused) == (tokenizer is None)
            if tokenizer is not None:
                assert len(info.draft.target_tokenizer_fingerprints) == 1
