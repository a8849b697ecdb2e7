"""`outrider check --files-only`: what the files of a pair say, and what the services refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from outrider.engine import EngineOptions, load_engine
from outrider.errors import ConfigError
from outrider_bench.check.inspection import (
    InspectOptions,
    PairInspection,
    TokenizerMatch,
    inspect_pair,
)
from outrider_bench.check.model_shape import ModelShape, model_shape
from tests.cli.conftest import write_tokenizer
from tests.cli.processes import run
from tests.e2e import byte_tokenizer
from tests.tiny_models import make_tiny_model
from tests.vocabularies import byte_fallback, save, word_piece


def tiny(family: str, directory: Path, **more: int) -> Path:
    return make_tiny_model(family, directory, vocab_size=byte_tokenizer.VOCAB_SIZE, **more)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny("gemma3", tmp_path_factory.mktemp("check") / "target", num_layers=4)
    return byte_tokenizer.add_byte_tokenizer(directory)


async def inspected(target: Path, draft: Path, **how: bool) -> PairInspection:
    return await inspect_pair(str(target), str(draft), InspectOptions(**how))


async def test_a_gemma_like_pair_is_described_and_not_refused(target: Path, tmp_path: Path) -> None:
    draft = byte_tokenizer.add_byte_tokenizer(tiny("gemma3", tmp_path, num_layers=1))
    inspection = await inspected(target, draft)
    assert inspection.refused == ()
    assert inspection.draft is not None
    assert inspection.tokenizers is not None
    assert inspection.tokenizers.match is TokenizerMatch.same
    assert inspection.target.architecture == inspection.draft.architecture == "gemma3_text"
    assert inspection.target.sliding_window == 13
    # Four layers against one: the same keys and values in each.
    assert inspection.target.kv_bytes_per_token == 4 * inspection.draft.kv_bytes_per_token
    assert inspection.parameter_ratio == pytest.approx(
        inspection.target.num_parameters / inspection.draft.num_parameters
    )
    assert any("10 times or more is usual" in note for note in inspection.notes)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_sizes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    options = EngineOptions(str(make_tiny_model(family, tmp_path)), kv_cache_tokens=64)
    shape, engine = model_shape(options), load_engine(options)
    assert shape.num_parameters == engine.info.num_parameters
    assert shape.vocab_size == engine.info.vocab_size
    assert shape.max_context_len == engine.info.max_context_len
    assert shape.dtype == engine.info.dtype
    rows = [*engine.store.keys, *engine.store.values]
    assert shape.kv_bytes_per_token == sum(row[0].nbytes for row in rows)


def test_sizes_of_a_mixture_of_experts_come_from_its_configuration(tmp_path: Path) -> None:
    """Experts are chosen by values, which a model without weights has not."""
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    shape = model_shape(EngineOptions(str(tmp_path), dtype="bfloat16"))
    assert shape.refused is None
    assert shape.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert shape.weight_bytes == 2 * shape.num_parameters > 0


async def test_tokenizers_that_differ_in_added_tokens_only_are_told_apart(tmp_path: Path) -> None:
    models = [make_tiny_model("llama", tmp_path / name, vocab_size=300) for name in ("a", "b")]
    plain, more = byte_fallback(), byte_fallback()
    more.add_special_tokens(["<|tool|>"])
    save(plain, models[0])
    save(more, models[1])
    tokenizers = (await inspected(*models)).tokenizers
    assert tokenizers is not None
    assert tokenizers.match is TokenizerMatch.added
    assert tokenizers.num_differing_ids == 1
    assert tokenizers.num_differing_ordinary_ids == 0
    assert tokenizers.examples == ((plain.get_vocab_size(), None, "<|tool|>"),)


async def test_a_draft_with_another_tokenizer_re_encodes_the_text(
    target: Path, tmp_path: Path
) -> None:
    draft = tiny("gemma3", tmp_path)
    write_tokenizer(draft, ["other words"] * 5)
    inspection = await inspected(target, draft)
    assert inspection.tokenizers is not None
    assert inspection.tokenizers.match is TokenizerMatch.different
    assert inspection.tokenizers.num_same_tokens >= 256  # all bytes, at other ids
    assert inspection.is_reencoded
    assert inspection.refused == ()
    assert any("--target-tokenizer" in note for note in inspection.notes)


async def test_a_tokenizer_that_cannot_be_re_encoded_is_refused_as_by_the_draft_service(
    target: Path, tmp_path: Path
) -> None:
    draft = tiny("gemma3", tmp_path)
    save(word_piece(), draft)
    (refusal,) = (await inspected(target, draft)).refused
    assert refusal.startswith("pair: target_tokenizer: the draft's tokens are no bytes of the text")


async def test_models_without_a_tokenizer_need_the_assumption(tmp_path: Path) -> None:
    models = [tiny("llama", tmp_path / name) for name in ("a", "b")]
    refused = (await inspected(*models)).refused
    assert len(refused) == 1
    assert "--assume-same-vocabulary" in refused[0]
    assert (await inspected(*models, assume_same_vocabulary=True)).refused == ()


async def test_a_shorter_context_and_another_family_are_noted(target: Path, tmp_path: Path) -> None:
    draft = tiny("llama", tmp_path, max_position_embeddings=128)
    notes = (await inspected(target, byte_tokenizer.add_byte_tokenizer(draft))).notes
    assert any(note.startswith("beyond 128 tokens of context") for note in notes)
    assert any(note.startswith("families differ (gemma3_text, llama)") for note in notes)


def test_a_model_that_the_engine_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    transformers.Llama4TextConfig().save_pretrained(tmp_path)
    refused = model_shape(EngineOptions(str(tmp_path))).refused
    assert refused is not None
    assert "chunked_attention layers" in refused


def test_a_missing_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        model_shape(EngineOptions(str(tmp_path / "none")))


def test_shapes_do_not_read_weights(tmp_path: Path) -> None:
    directory = make_tiny_model("qwen3", tmp_path)
    (directory / "model.safetensors").unlink()
    assert isinstance(model_shape(EngineOptions(str(directory))), ModelShape)


@pytest.mark.slow
def test_exit_status_and_json_without_loading(target: Path, tmp_path: Path) -> None:
    """Status 3 for a pair that must not speculate, 0 if a draft may, 2 for a wrong path."""
    draft = tiny("gemma3", tmp_path / "draft", num_layers=1)
    wrong = tiny("gemma3", tmp_path / "wrong", num_layers=1)
    byte_tokenizer.add_byte_tokenizer(draft)
    save(word_piece(), wrong)
    files = ("check", "--files-only", "--json", str(target))
    ended = run(*files, str(wrong), str(draft))
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    verdicts = [(one["draft"], one["is_worth_it"]) for one in report["drafts"]]
    assert verdicts == [(str(draft), True), (str(wrong), False)], "the better one is first"
    ended = run(*files, str(wrong))
    assert ended.returncode == 3, ended.stderr
    assert json.loads(ended.stdout)["drafts"][0]["verdict"].startswith("do not speculate: ")
    assert run(*files, str(tmp_path / "none")).returncode == 2
