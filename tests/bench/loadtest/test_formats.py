"""Public traces, in the schemas they are published in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from outrider.errors import ConfigError
from outrider_bench.commands.serve_options import ServeOptions, planned_visits
from outrider_bench.loadtest.plan import BLOCK_TOKENS, prompt_ids
from outrider_bench.loadtest.trace import Trace, read_trace

MOONCAKE = (
    '{"timestamp": 0, "input_length": 1024, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3052, "input_length": 700, "output_length": 26, "hash_ids": [0, 7]}\n'
)
AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
    "2023-11-16 18:15:51.2224670,879,55\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:00.017335+00:00,2399,6\n"
    "2024-05-10 00:00:01+00:00,76,15\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,0,1087,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)
BURSTGPT_SESSIONS = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,a1,2.5,ChatGPT,472,18,490,Conversation log\n"
    "118,,1,GPT-4,417,276,693,API log\n"
)
SHAREGPT = json.dumps(
    [
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "What is a page table?"},
                {"from": "gpt", "value": "It maps virtual pages to frames." * 5},
                {"from": "human", "value": "Thanks"},
            ],
        },
        {"id": "i6IyJda_0", "conversations": [{"from": "gpt", "value": "Welcome back."}]},
        {"id": "empty", "conversations": []},
        {
            "id": "K2Q1b_0",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hey"},
            ],
        },
    ]
)
FILES = {
    "mooncake": ("mooncake.jsonl", MOONCAKE),
    "azure": ("AzureLLMInferenceTrace_conv.csv", AZURE_2023),
    "burstgpt": ("BurstGPT_1.csv", BURSTGPT),
    "sharegpt": ("ShareGPT_V3_unfiltered_cleaned_split.json", SHAREGPT),
}


def read(folder: Path, file: str, text: str, name: str | None = None) -> Trace:
    (folder / file).write_text(text, "utf-8")
    return read_trace(folder / file, name=name)


def shape(trace: Trace) -> list[tuple[float | None, int, int]]:
    """Time, prompt length and output length of requests without sessions."""
    assert not any(visit.is_session for visit in trace.conversations)
    jobs = [job for visit in trace.conversations for job in visit.jobs]
    times = [None if v.at_s is None else round(v.at_s, 6) for v in trace.conversations]
    return [(at, j.prompt_len, j.max_tokens) for at, j in zip(times, jobs, strict=True)]


def test_mooncake(tmp_path: Path) -> None:
    """Milliseconds; requests that share hash ids share the tokens of these blocks."""
    trace = read(tmp_path, "m.jsonl", MOONCAKE)
    assert shape(trace) == [(0.0, 1024, 500), (3.052, 700, 26)]
    ordinary = np.arange(10, 900)
    first, second = (prompt_ids(v.jobs[0], ordinary, 0, 1) for v in trace.conversations)
    assert (len(first), len(second)) == (1024, 700)
    assert first[:BLOCK_TOKENS] == second[:BLOCK_TOKENS]
    assert first[BLOCK_TOKENS:700] != second[BLOCK_TOKENS:]
    again = prompt_ids(trace.conversations[0].jobs[0], ordinary, 0, 2)
    assert not set(zip(again[:50], range(50), strict=True)) >= set(
        zip(first[:50], range(50), strict=True)
    ), "not those of the previous phase, which are cached"


def test_azure(tmp_path: Path) -> None:
    trace = read(tmp_path, "a.csv", AZURE_2023)
    assert shape(trace) == [(0.0, 374, 44), (4.314579, 396, 109), (4.541877, 879, 55)]
    trace = read(tmp_path, "b.csv", AZURE_2024)
    assert shape(trace) == [(0.0, 2162, 5), (0.007405, 2399, 6), (0.99007, 76, 15)]


def test_burstgpt(tmp_path: Path) -> None:
    """Seconds; failed requests are left out and counted."""
    trace = read(tmp_path, "b.csv", BURSTGPT)
    assert shape(trace) == [(0.0, 472, 18), (113.0, 417, 276)]
    assert trace.num_left_out == 1
    trace = read(tmp_path, "c.csv", BURSTGPT_SESSIONS)
    assert shape(trace) == [(0.0, 472, 18), (113.0, 417, 276)]
    messages: list[str] = []
    planned_visits(ServeOptions(trace=tmp_path / "b.csv"), messages.append)
    assert messages == ["1 requests of the trace have no output and are skipped"]


def test_sharegpt(tmp_path: Path) -> None:
    """First question and answer; without times."""
    trace = read(tmp_path, "s.json", SHAREGPT)
    assert shape(trace) == [(None, 0, 40), (None, 0, 1)]
    assert [v.jobs[0].text for v in trace.conversations] == ["What is a page table?", "Hi"]
    path = tmp_path / "s.json"
    with pytest.raises(ConfigError, match="no times; add --rate or --concurrency"):
        planned_visits(ServeOptions(trace=path))
    assert len(planned_visits(ServeOptions(trace=path, concurrency=2))) == 2


@pytest.mark.parametrize("name", FILES)
def test_named_format_equals_the_detected_one(name: str, tmp_path: Path) -> None:
    file, text = FILES[name]
    assert read(tmp_path, file, text, name) == read(tmp_path, file, text)
    with pytest.raises(
        ConfigError, match=r"^--trace-format: 'x' is unknown; allowed: outrider, mooncake"
    ):
        read(tmp_path, file, text, "x")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("m.jsonl", MOONCAKE.replace("700", '"x"'), "line 2: input_length: 'x' is not a number"),
        ("m.jsonl", MOONCAKE.replace("[0, 7]", "[0]"), "line 2: hash_ids: 1 blocks of 512"),
        ("m.jsonl", MOONCAKE.replace("[0, 7]", '"0"'), "line 2: hash_ids: 0 is not a list"),
        ("m.jsonl", MOONCAKE + "{", "line 3: '{' is not a JSON object"),
        ("a.csv", AZURE_2023.replace("50.99", "5x.99"), "line 3: TIMESTAMP: "),
        (
            "a.csv",
            AZURE_2023.replace(",396,", ",,"),
            "line 3: ContextTokens is missing",
        ),
        ("a.csv", AZURE_2023.replace(",109", ",many"), "line 3: GeneratedTokens: 'many'"),
        (
            "b.csv",
            BURSTGPT.replace("417", "-1"),
            "line 4: Request tokens: -1 is not a positive number of tok",
        ),
        ("b.csv", BURSTGPT.replace("118,", "soon,"), "line 4: Timestamp: 'soon' is not a number"),
        (
            "s.json",
            SHAREGPT.replace('"value": "Hey"', '"value": 3'),
            r"conversation 4: conversations\[1\]\.value is not a text",
        ),
        ("s.json", '{"conversations": []}', "line 1: 'conversations'; expected timestamp"),
        ("s.json", "[1]", "conversation 1: conversations is not a list"),
        ("s.json", "[{", "is not JSON"),
    ],
)
def test_errors_name_line_and_field(file: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, file, text)
