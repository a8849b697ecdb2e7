"""Files of a model's tokenizer, from a local directory, the Hugging Face Hub or its cache.

Tokenizers without `tokenizer.json` (SentencePiece, tiktoken, vocab.json with merges.txt) are
converted with transformers, which is installed with the model services only.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import structlog
import tokenizers
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from outrider.errors import ConfigError
from outrider.model_source import ModelSource

log = structlog.get_logger()

# If one of these is in the Hub's cache, the model was downloaded before.
_MAIN_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_TIMEOUT_S = 10.0
# OSError and the HTTP library's base error, which differs between versions of the Hub client.
_HUB_ERRORS: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__

# Files of tokenizers that the `tokenizers` library cannot read.
UNCONVERTED = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json",
)  # fmt: skip

TOKENIZERS = ("tokenizer.json", *UNCONVERTED)

NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

# Default special tokens of transformers' tokenizer classes: their files may leave them out. A test
# compares them with transformers.
_ENDOFTEXT = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN = {"eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT, "pad_token": _ENDOFTEXT}
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GPT2Tokenizer": {"bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT},
    "GPTNeoXTokenizer": {
        "bos_token": _ENDOFTEXT, "eos_token": _ENDOFTEXT, "unk_token": _ENDOFTEXT,
        "pad_token": "<|padding|>",
    },
    "GemmaTokenizer": {
        "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>",
        "sep_token": "<SEP>", "pad_token": "<PAD>", "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
    "XGLMTokenizer": {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
        "pad_token": "<pad>", "cls_token": "<s>",
    },
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}  # fmt: skip


class TokenizerFiles:
    """Finds and reads the tokenizer files of a model: a directory, or NAME@REVISION on the Hub."""

    def __init__(self, model: str) -> None:
        """Raises ConfigError for a revision of a directory."""
        source = ModelSource.parse(model)
        self._given = model
        self._model, self._revision = source.name, source.revision
        directory = source.directory
        self._directory = directory if directory is not None and directory.is_dir() else None

    @functools.cached_property
    def _hub_error(self) -> BaseException | None:
        """Error of a first request to the Hub, made once without retries; None: it is reachable."""
        try:
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(self._model, "config.json", revision=self._revision),
                timeout=_HUB_TIMEOUT_S,
            )
        except HFValidationError as error:
            raise ConfigError(
                f"'{self._model}' is neither a local directory nor a name on the Hub"
            ) from error
        except RepositoryNotFoundError as error:  # also for gated models
            return error
        except EntryNotFoundError:
            return None
        except _HUB_ERRORS as error:
            return error
        return None

    def find(self, name: str) -> Path | None:
        """Path of the file; None: the model has none. Raises ConfigError if that is unknown."""
        if self._directory is not None:
            path = self._directory / name
            return path if path.is_file() else None
        if self._hub_error is not None:
            return self._cached(name, self._hub_error)
        try:
            return Path(huggingface_hub.hf_hub_download(self._model, name, revision=self._revision))
        except LocalEntryNotFoundError as error:
            return self._cached(name, error)
        except EntryNotFoundError:
            return None
        except _HUB_ERRORS as error:
            return self._cached(name, error)

    def _cached(self, name: str, error: BaseException) -> Path | None:
        """The file in the Hub's cache, as transformers does while the Hub is unreachable."""
        if path := self._in_cache(name):
            return path
        if any(self._in_cache(file) for file in _MAIN_FILES):
            log.info("not_in_hub_cache", model=self._model, file=name)
            return None
        if isinstance(error, RevisionNotFoundError):
            raise ConfigError(
                f"revision: '{self._model}' has no branch, tag or commit '{self._revision}'"
            ) from error
        if isinstance(error, RepositoryNotFoundError):
            why = str(error).strip().splitlines()[-1]
            raise ConfigError(f"'{self._model}' is not a local directory; Hub: {why}") from error
        raise ConfigError(
            f"'{self._given}' is not a local directory, it is not in the Hub's cache, and the "
            f"Hugging Face Hub is unreachable: {str(error).strip().splitlines()[0]}"
        ) from error

    def _in_cache(self, name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(self._model, name, revision=self._revision)
        return Path(found) if isinstance(found, str) else None

    def settings(self) -> dict[str, Any]:
        """Contents of tokenizer_config.json; empty if there is none. Raises ConfigError.

        For a converted tokenizer, completed with the settings of its transformers class.
        """
        path = self.find("tokenizer_config.json")
        settings = dict(self._converted.settings) if self._converted is not None else {}
        settings |= _read_object(path) if path else {}
        if template := self.find("chat_template.jinja"):
            settings["chat_template"] = template.read_text("utf-8")
        return settings

    def chat_templates(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Chat templates by name: `default`, and `tool_use` where requests with tools have one."""
        template = settings.get("chat_template")
        if isinstance(template, list):
            templates = {entry["name"]: entry["template"] for entry in template}
        else:
            templates = {"default": template} if template else {}
        if path := self.find("additional_chat_templates/tool_use.jinja"):
            templates["tool_use"] = path.read_text("utf-8")
        return templates

    def special_tokens(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Texts of special tokens by name, as in transformers' `special_tokens_map`."""
        tokens: dict[str, Any] = dict(CLASS_TOKENS.get(self._class_name(settings), {}))
        tokens |= _named(settings)
        if "added_tokens_decoder" not in settings:
            path = self.find("special_tokens_map.json")
            tokens |= _named(_read_object(path)) if path else {}
        return {name: _text_of(token) for name, token in tokens.items() if token is not None}

    def _class_name(self, settings: Mapping[str, Any]) -> str:
        name = str(settings.get("tokenizer_class") or "")
        return name.removesuffix("Fast")

    def backend(self) -> tokenizers.Tokenizer | None:
        """The tokenizer; None if the model has none. Raises ConfigError."""
        if path := self.find("tokenizer.json"):
            return tokenizers.Tokenizer.from_file(str(path))
        return None if self._converted is None else self._converted.backend

    @functools.cached_property
    def _converted(self) -> Converted | None:
        """The converted tokenizer; None if there is none to convert. Raises ConfigError."""
        if self.find("tokenizer.json") is not None or not self._is_convertible():
            return None
        return converted(self._given)

    def _is_convertible(self) -> bool:
        """Whether there is a tokenizer to convert. Raises ConfigError without transformers."""
        found = next((name for name in UNCONVERTED if self.find(name)), None)
        if found is not None and importlib.util.find_spec("transformers") is None:
            raise ConfigError(
                f"{self._model} has {found} and no tokenizer.json; convert it where transformers "
                f"is installed: outrider convert-tokenizer {self._model} DIRECTORY"
            )
        return found is not None

    def convert(self) -> dict[str, str]:
        """Contents of the files, by name, that make this tokenizer readable without transformers.

        Raises ConfigError.
        """
        backend = self.backend()
        if backend is None:
            raise ConfigError(f"{self._model} has no tokenizer")
        files = {
            "tokenizer.json": backend.to_str(),
            "tokenizer_config.json": json.dumps(self.settings(), indent=2) + "\n",
        }
        for name in ("special_tokens_map.json", "generation_config.json", "config.json"):
            if path := self.find(name):
                files[name] = path.read_text("utf-8")
        return files


@dataclass(frozen=True)
class Converted:
    """A converted tokenizer. `settings`: its class's defaults for tokenizer_config.json."""

    backend: tokenizers.Tokenizer
    settings: Mapping[str, Any]


def converted(model: str) -> Converted:
    """Converts with transformers, in seconds. Raises ConfigError if transformers cannot."""
    from transformers import AutoTokenizer

    source = ModelSource.parse(model)
    name = source.name if source.directory is None else str(source.directory)
    try:
        loaded = AutoTokenizer.from_pretrained(
            name, revision=source.revision, trust_remote_code=False
        )
    except Exception as error:  # the converters raise many types
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the tokenizer of {model} cannot be converted: {why}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    kind = type(loaded).__name__
    if backend is None:
        raise ConfigError(
            f"the tokenizer of {model} cannot be converted: {kind} is a pure Python tokenizer"
        )
    assert isinstance(backend, tokenizers.Tokenizer)
    named = {name: str(getattr(loaded, name)) for name in NAMED_TOKENS if getattr(loaded, name)}
    template = {"chat_template": loaded.chat_template} if loaded.chat_template else {}
    return Converted(backend, {"tokenizer_class": kind, **named, **template})


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens by name, of tokenizer_config.json or special_tokens_map.json."""
    tokens = {
        name: value
        for name, value in settings.items()
        if name in NAMED_TOKENS or (name.endswith("_token") and isinstance(value, str | dict))
    }
    for name in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(more := settings.get(name), dict):
            tokens |= more
    return tokens


def _text_of(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _read_object(path: Path) -> dict[str, Any]:
    settings = json.loads(path.read_text("utf-8"))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return settings
