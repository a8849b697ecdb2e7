"""Tokenizer files compared with transformers; no network, a Hub cache made here."""

from __future__ import annotations

import http.server
import inspect
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from outrider import tokenizer_files
from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer
from tests import vocabularies

TEMPLATE = (
    "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ unk_token }}|{{ image_token }}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
)
MESSAGES = [{"role": "user", "content": "ab"}]
HUB_NAME = "acme/tiny"


def rendered(directory: Path) -> str:
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    return tokenizer.render_chat(MESSAGES)


def reference(directory: Path) -> str:
    loaded = AutoTokenizer.from_pretrained(directory)
    return str(loaded.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False))


SPECIAL = {
    "of the class": ({"tokenizer_class": "LlamaTokenizer"}, {}),
    "of the fast class": ({"tokenizer_class": "LlamaTokenizerFast", "eos_token": None}, {}),
    "of another class": ({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"}, {}),
    "in the map": ({}, {"bos_token": "<s>", "sep_token": {"content": "<sep>", "lstrip": False}}),
    "the map wins": ({"bos_token": "<old>"}, {"bos_token": "<s>"}),
    "the map is not read": ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "<t>"}),
    "named by the model": ({"extra_special_tokens": {"image_token": "<image>"}}, {}),
    "named at the top": ({"image_token": "<image>"}, {}),
    "a list": ({"extra_special_tokens": ["<image>"], "bos_token": "<s>"}, {}),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_templates_have_the_special_tokens_of_transformers(case: str, tmp_path: Path) -> None:
    config, special_map = SPECIAL[case]
    directory = vocabularies.save(
        vocabularies.byte_fallback(), tmp_path / "model", chat_template=TEMPLATE, **config
    )
    if special_map:
        (directory / "special_tokens_map.json").write_text(json.dumps(special_map), "utf-8")
    assert rendered(directory) == reference(directory)


@pytest.mark.parametrize("name", tokenizer_files.CLASS_TOKENS)
def test_tokens_of_classes_are_those_of_transformers(name: str) -> None:
    parameters = inspect.signature(tokenizer_class_from_name(name).__init__).parameters
    expected = {
        token: str(parameters[token].default)
        for token in tokenizer_files.NAMED_TOKENS
        if token in parameters and parameters[token].default not in (None, inspect.Parameter.empty)
    }
    assert dict(tokenizer_files.CLASS_TOKENS[name]) == expected


def test_a_sentencepiece_vocabulary_is_converted(tmp_path: Path) -> None:
    """Without tokenizer.json: the same ids and text as transformers', and its end token."""
    directory = vocabularies.write_sentencepiece(tmp_path / "model")
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    oracle = PreTrainedTokenizerFast.from_pretrained(directory)
    text = "ab 🇫🇷 Hello  world\n你"
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))
    assert tokenizer.eos_token_id == oracle.eos_token_id == 2


def test_a_vocabulary_of_two_files_is_converted(tmp_path: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 ships them."""
    directory = tmp_path / "model"
    directory.mkdir()
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġab": 5}
    (directory / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", "utf-8")
    vocabularies.write_config(directory, tokenizer_class="GPT2Tokenizer")
    tokenizer = Tokenizer.load(str(directory))
    assert tokenizer is not None
    assert tokenizer.encode("ab ab") == [3, 5]


def test_without_transformers_the_error_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = vocabularies.write_sentencepiece(tmp_path / "model")
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tokenizer\.model and no .*outrider convert"):
        Tokenizer.load(str(directory))


def test_a_failed_conversion_is_a_config_error(tmp_path: Path) -> None:
    directory = vocabularies.write_sentencepiece(tmp_path / "model")
    (directory / "tokenizer.model").write_bytes(b"no vocabulary")
    with pytest.raises(ConfigError, match="cannot be converted"):
        Tokenizer.load(str(directory))


# The Hub ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def fill(cache: Path) -> None:
    """Fills the cache as a download does; the repository has no chat_template.jinja."""
    repository = cache / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    made = vocabularies.save(
        vocabularies.byte_fallback(), cache / "made", bos_token="<s>", chat_template=TEMPLATE
    )
    for path in made.iterdir():
        shutil.copy(path, snapshot / path.name)
    (snapshot / "config.json").write_text("{}")


class Refusing(http.server.BaseHTTPRequestHandler):
    """A Hub that answers every request with one status."""

    status = 500

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


HUBS = {"offline": None, "unreachable": None, "429": 429, "503": 503}


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
        return
    handler = type("Handler", (Refusing,), {"status": HUBS[request.param]})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        if request.param == "unreachable":
            server.server_close()
            yield
            return
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("hub")
def test_a_cached_model_is_loaded_without_the_hub(cache: Path) -> None:
    fill(cache)
    tokenizer = Tokenizer.load(HUB_NAME)
    assert tokenizer is not None
    assert tokenizer.render_chat(MESSAGES).endswith("user: ab")


@pytest.mark.usefixtures("hub")
def test_a_model_that_is_not_cached_is_a_config_error(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"'acme/tiny' .*not in the Hub's cache"):
        Tokenizer.load(HUB_NAME)
