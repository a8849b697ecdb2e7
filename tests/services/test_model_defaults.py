"""Sampling defaults and end tokens in the model's files: used, reported, and optional."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from outrider.errors import ConfigError
from outrider.model_server.load_engine import load_served_engine, sampling_defaults
from outrider.settings.services import TargetConfig
from outrider.v1 import orchestrator_pb2
from tests.services.parts import KV_TOKENS, Pair, both_tiers, orchestrating

DEFAULTS = {"temperature": 0.0, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5}
PROMPT = [5, 9, 5, 9, 7]


@pytest.fixture
def copy(pair: Pair, tmp_path: Path) -> Pair:
    """A copy of the pair, to change its files."""
    copied = Pair(tmp_path / "target", tmp_path / "draft")
    for old, new in zip(pair, copied, strict=True):
        shutil.copytree(old, new)
    return copied


def write(directory: Path, **settings: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(settings), "utf-8")


async def test_sampling_settings_of_the_model_are_defaults(copy: Pair, redis_url: str) -> None:
    """Including the penalty, which changes greedy output. A request's field has precedence."""
    write(copy.target, **DEFAULTS, max_new_tokens=24, do_sample=True)
    explicit = {**DEFAULTS, "max_tokens": 24}
    async with both_tiers(copy) as tiers, orchestrating(tiers, redis_url) as stack:
        given = await stack.generate(PROMPT, sampling={})
        assert given.token_ids == (await stack.generate(PROMPT, sampling=explicit)).token_ids
        assert len(given.token_ids) == 24
        other = {**explicit, "repetition_penalty": 1.0}
        without = await stack.generate(PROMPT, sampling={"repetition_penalty": 1.0})
        assert without.token_ids == (await stack.generate(PROMPT, sampling=other)).token_ids
        assert without.token_ids != given.token_ids
        info = await stack.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
        defaults = {f.name: value for f, value in info.target.sampling_defaults.ListFields()}
        assert defaults == pytest.approx({**explicit})


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
        {"top_k": 64, "top_p": 0.95, "min_p": 0.0, "max_new_tokens": 2048, "temperature": None},
        {"do_sample": False, "num_beams": 4, "max_length": 100},
    ],
)
def test_defaults_are_those_that_vllm_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    """What transformers' configuration has beyond its own defaults, for vLLM's six fields."""
    write(tmp_path, **settings)
    theirs = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    expected = {name: theirs[name] for name in names if theirs.get(name) is not None}
    given = {f.name: value for f, value in sampling_defaults(str(tmp_path), 256).ListFields()}
    if "max_tokens" in given:
        given["max_new_tokens"] = given.pop("max_tokens")
    assert given == pytest.approx(expected)


async def test_the_models_defaults_can_be_ignored(copy: Pair, redis_url: str) -> None:
    write(copy.target, **DEFAULTS)
    async with (
        both_tiers(copy, generation_config="none") as tiers,
        orchestrating(tiers, redis_url, default_max_tokens=8, gamma=0) as stack,
    ):
        seeded = {"seed": 3}
        explicit = {**seeded, "temperature": 1.0, "repetition_penalty": 1.0, "top_k": 0}
        plain = await stack.generate(PROMPT, sampling=explicit)
        assert (await stack.generate(PROMPT, sampling=seeded)).token_ids == plain.token_ids
        info = await stack.client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
        assert not info.target.sampling_defaults.ListFields()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": "high"}, "generation_config"),
        ({"top_k": 2.5}, "generation_config"),
    ],
)
def test_invalid_defaults_are_an_error_naming_the_file(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write(tmp_path, **settings)
    with pytest.raises(ConfigError, match=rf"{named}.*--generation-config none"):
        sampling_defaults(str(tmp_path), 256)


@pytest.mark.parametrize("uses_it", [True, False])
def test_the_tokenizers_own_end_token_ends_outputs(
    chat_pair: Pair, tmp_path: Path, uses_it: bool
) -> None:
    """For example a chat model whose generation_config.json names only another one."""
    target = tmp_path / "target"
    shutil.copytree(chat_pair.target, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(target)
    write(target, eos_token_id=299)
    config = TargetConfig(
        model=str(target), port=0, kv_cache_tokens=KV_TOKENS, tokenizer_eos=uses_it
    )
    info = load_served_engine(config).model
    expected = [299, tokenizer.eos_token_id] if uses_it else [299]
    assert list(info.eos_token_ids) == expected
