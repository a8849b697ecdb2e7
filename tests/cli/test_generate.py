"""`outrider generate` and the short commands against a running system, as processes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from outrider.cli.request import (
    DraftSource,
    DraftWait,
    Durability,
    GenerateOptions,
    Method,
    build_request,
)
from outrider.client import Chunk
from outrider.errors import ConfigError, InvalidRequest
from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.cli.processes import ROOT, command, environment, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

PROMPT = ("the quick", "--max-tokens=24", "--temperature=0", "--ignore-eos")


def result(*arguments: str) -> dict[str, Any]:
    ended = run(*arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    values: dict[str, Any] = json.loads(ended.stdout)
    return values


def test_json_is_the_whole_result(endpoint: str) -> None:
    """One line; nothing else on standard output."""
    # A fixed γ: the adaptive one may be 0 for such a small pair.
    how = ("--gamma=3", "--logprobs=2", "--seed=5")
    values = result("generate", *PROMPT, "--endpoint", endpoint, *how)
    assert len(values["token_ids"]) == len(values["origins"]) == len(values["logprobs"]) == 24
    assert set(values["origins"]) <= {"accepted", "recovered", "bonus", "plain"}
    assert len(values["logprobs"][0]["top_ids"]) == 2
    assert (values["finish_reason"], values["stopped_by"]) == ("length", None)
    assert values["usage"]["completion_tokens"] == 24
    assert values["seed"] == 5
    assert values["verification"] == "rejection"
    stats = values["speculation"]
    assert stats["num_accepted_tokens"] == values["origins"].count("accepted")
    assert stats["draft_wire_bytes"] > 0


def test_plain_output_is_the_text_alone(endpoint: str) -> None:
    """The summary goes to standard error; `-` reads the prompt from standard input."""
    text = result("generate", *PROMPT, "--endpoint", endpoint)["text"]
    piped = run(
        "generate", "-", *PROMPT[1:], "--gamma=3", "--endpoint", endpoint, stdin="the quick"
    )
    assert piped.stdout == text
    assert "tokens/s" in piped.stderr
    assert "α" in piped.stderr


def test_colours_on_a_terminal(endpoint: str) -> None:
    """The same text apart from colours, a legend and the summary."""
    text = result("generate", *PROMPT, "--endpoint", endpoint)["text"]
    shown = _on_a_terminal("generate", *PROMPT, "--gamma=3", "--endpoint", endpoint)
    assert "\x1b[32m" in shown  # an accepted token
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n")
    assert "■ accepted" in bare
    assert "first token after" in bare
    assert text in bare.translate({0x2400 + code: code for code in range(0x20)})


def _on_a_terminal(*arguments: str) -> str:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command(*arguments), stdin=follower, stdout=follower, stderr=follower,
        cwd=ROOT, env=environment(),
    ):  # fmt: skip
        os.close(follower)
        data = b""
        try:
            while block := os.read(leader, 1 << 16):
                data += block
        except OSError:  # a closed terminal
            pass
    os.close(leader)
    return data.decode()


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--top-p=7", "sampling.top_p"),
        ("--gamma=99", "gamma"),
        ("--gamma=-1", "gamma"),
        ("--stop-token-ids=1,99999", "sampling.stop_token_ids"),
    ],
)
def test_bad_values_are_named(endpoint: str, flag: str, field: str) -> None:
    """Exit status 1, one line with status and field, nothing on standard output."""
    ended = run("generate", "x", flag, "--endpoint", endpoint)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: INVALID_ARGUMENT: {field}: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_unreachable_endpoint() -> None:
    """Exit status 1; the message has the endpoint and what to do."""
    ended = run("generate", "x", "--endpoint=127.0.0.1:1")
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: UNAVAILABLE: nothing answers at 127.0.0.1:1; start it with: outrider up\n"
    )


def test_sessions(endpoint: str) -> None:
    """Created, continued, shown, deleted."""
    first = result("generate", *PROMPT, "--session=s", "--endpoint", endpoint)
    result("generate", *PROMPT, "--session=s", "--endpoint", endpoint)
    session = result("session", "get", "s", "--endpoint", endpoint)
    assert session["num_turns"] == 2
    assert session["num_emitted_tokens"] == 48
    assert first["session_id"] == "s"
    assert "num emitted tokens" in run("session", "get", "s", "--endpoint", endpoint).stdout
    assert run("session", "delete", "s", "--endpoint", endpoint).returncode == 0
    gone = run("session", "get", "s", "--endpoint", endpoint)
    assert gone.returncode == 1
    assert gone.stderr.startswith("error: NOT_FOUND: ")


def test_chat_and_token_ids(endpoint: str) -> None:
    """Prompts as chat and as token ids."""
    limits = ("--max-tokens=4", "--ignore-eos", "--endpoint", endpoint)
    chat = result("generate", "hello", "--chat", "--system=be brief", *limits)
    assert chat["usage"]["prompt_tokens"] > 10
    ids = result("generate", "--token-ids=1,2,3", "--prompt-logprobs=2", *limits)
    assert ids["usage"]["prompt_tokens"] == 3
    assert ids["prompt_logprobs"]["token_ids"] == [1, 2, 3]
    assert len(ids["prompt_logprobs"]["top_ids"]) == 4


def test_model(endpoint: str, target: Path) -> None:
    """Models of both tiers."""
    values = result("model", "--endpoint", endpoint)
    assert values["target"]["name"] == str(target)
    assert values["draft"]["vocab_size"] == values["target"]["vocab_size"]


def test_wire_bytes(endpoint: str) -> None:
    """Each method at both temperatures; coupled sends no probabilities."""
    lines = json.loads(
        run("bench", "wire", "--endpoint", endpoint, "--runs=1", "--max-tokens=32", "--json").stdout
    )
    assert len(lines["results"]) == 6
    by_kind = {(line["method"], line["temperature"]): line for line in lines["results"]}
    coupled, rejection = by_kind["coupled", 1.0], by_kind["rejection", 1.0]
    assert coupled["draft_bytes_per_token"] < rejection["draft_bytes_per_token"]


def test_every_flag_becomes_its_field() -> None:
    """All flags at once."""
    options = GenerateOptions(
        prompt="p", session="s", max_tokens=1, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125,
        seed=7, gamma=2, verification=Method.block, lookahead=0, stop=["a", "b"],
        stop_token_ids="1, 2", ignore_eos=True, min_tokens=1, presence_penalty=1.0,
        frequency_penalty=-1.0, repetition_penalty=1.5, logit_bias=["5=-2.5"],
        allowed_token_ids="8,9", logprobs=0, priority=-3, durability=Durability.fast,
        draft_wait=DraftWait.always, draft_source=DraftSource.lookup, bad_words=["x", "y"],
        skip_special_tokens=False, include_stop_str_in_output=True, add_special_tokens=True,
        truncate_prompt_tokens=-1, prompt_logprobs=0,
    )  # fmt: skip
    assert build_request(options) == orchestrator_pb2.GenerateRequest(
        text="p", session_id="s", create_session=True, gamma=2, lookahead=0, priority=-3,
        durability=orchestrator_pb2.DURABILITY_FAST,
        draft_wait=orchestrator_pb2.DRAFT_WAIT_ALWAYS,
        draft_source=orchestrator_pb2.DRAFT_SOURCE_LOOKUP,
        verification=sampling_pb2.VERIFICATION_BLOCK,
        sampling=sampling_pb2.SamplingParams(
            max_tokens=1, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, seed=7,
            stop=["a", "b"], stop_token_ids=[1, 2], ignore_eos=True, min_tokens=1,
            presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.5,
            logit_bias={5: -2.5}, allowed_token_ids=[8, 9], logprobs=0, bad_words=["x", "y"],
            skip_special_tokens=False, include_stop_str_in_output=True, prompt_logprobs=0,
        ),
        add_special_tokens=True, truncate_prompt_tokens=-1,
    )  # fmt: skip


def test_flags_of_a_chat_become_its_fields(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]), "utf-8")
    options = GenerateOptions(
        prompt="p", chat=True, answer_start="It is", tools=tmp_path / "tools.json",
        chat_template_kwargs='{"enable_thinking": false}',
    )  # fmt: skip
    assert build_request(options).chat == orchestrator_pb2.ChatMessages(
        messages=[
            orchestrator_pb2.ChatMessage(role="user", content="p"),
            orchestrator_pb2.ChatMessage(role="assistant", content="It is"),
        ],
        tools=[json.dumps(tool)],
        chat_template_kwargs='{"enable_thinking": false}',
        continue_final_message=True,
    )


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(),
        GenerateOptions(prompt="p", token_ids="1"),
        GenerateOptions(prompt="p", system="s"),
        GenerateOptions(token_ids="1", chat=True),
        GenerateOptions(token_ids="1;2"),
        GenerateOptions(prompt="p", answer_start="s"),
        GenerateOptions(prompt="p", tools=Path("tools.json")),
        GenerateOptions(prompt="p", chat=True, tools=Path("no such file")),
        GenerateOptions(prompt="p", chat=True, chat_template_kwargs="{"),
        GenerateOptions(prompt="p", logit_bias=["5"]),
    ],
)
def test_wrong_combinations_of_flags(options: GenerateOptions) -> None:
    """ConfigError before anything is sent."""
    with pytest.raises(ConfigError):
        build_request(options)


def test_flags_of_the_outputs_format(tmp_path: Path) -> None:
    """Each becomes its field; a file that cannot be read is an error that names the flag."""
    path = tmp_path / "file"
    path.write_text('{"type": "null"}')
    formats: list[tuple[GenerateOptions, sampling_pb2.StructuredOutputs]] = [
        (
            GenerateOptions(prompt="p", json_schema=path),
            sampling_pb2.StructuredOutputs(json='{"type": "null"}'),
        ),
        (
            GenerateOptions(prompt="p", grammar=path),
            sampling_pb2.StructuredOutputs(grammar='{"type": "null"}'),
        ),
        (
            GenerateOptions(prompt="p", json_object=True),
            sampling_pb2.StructuredOutputs(json_object=True),
        ),
        (GenerateOptions(prompt="p", regex=""), sampling_pb2.StructuredOutputs(regex="")),
        (
            GenerateOptions(prompt="p", choice=["a", "b"]),
            sampling_pb2.StructuredOutputs(choice=["a", "b"]),
        ),
    ]
    for options, expected in formats:
        assert build_request(options).sampling.structured_outputs == expected
    with pytest.raises(ConfigError, match=r"--json-schema: .*: No such file"):
        build_request(GenerateOptions(prompt="p", json_schema=tmp_path / "none"))


def test_numbers_out_of_a_fields_range() -> None:
    """The error names the field as the server does."""
    with pytest.raises(InvalidRequest, match=r"^sampling\.seed: -1"):
        build_request(GenerateOptions(prompt="p", seed=-1))
    with pytest.raises(InvalidRequest, match=r"^token_ids: "):
        build_request(GenerateOptions(token_ids="-4"))


def test_text_is_split_by_token() -> None:
    """Tokens without text are skipped; text after the last end belongs to the last token."""
    chunk = Chunk("añ世cd", [5, 6, 7], ["accepted", "accepted", "bonus"], [], [1, 1, 4])
    assert list(chunk.pieces()) == [("a", "accepted"), ("ñ世c", "bonus"), ("d", "bonus")]
    assert list(Chunk("x", [], [], [], []).pieces()) == [("x", "plain")]


def test_short_requests_use_the_next_endpoint(endpoint: str) -> None:
    """The failure is on standard error; the output is the answer alone."""
    ended = run("model", "--json", "--endpoint", f"127.0.0.1:1,{endpoint}")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["target"]["vocab_size"] == 300
    assert "nothing answers at 127.0.0.1:1" in ended.stderr
    assert "; trying the next endpoint" in ended.stderr
