"""Settings of the orchestrator's tokenizer and chat template."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.settings.fields import require, setting


@dataclass(frozen=True)
class TokenizerSettings:
    """Tokenizer with which the orchestrator encodes prompts, renders chats and decodes outputs."""

    tokenizer: str | None = setting(
        None, "local directory or Hub name of the tokenizer; unset: token ids only"
    )
    chat_template: str | None = setting(
        None, "file with a chat template (Jinja) to use instead of the tokenizer's"
    )
    assume_same_vocabulary: bool = setting(
        False,
        "pair models although one has no tokenizer to compare; their token ids must match",
    )

    def check_tokenizer(self) -> None:
        """Raises ConfigError for settings that do not fit each other."""
        has_tokenizer = bool(self.tokenizer)
        require(not self.chat_template or has_tokenizer, "chat_template", "needs a tokenizer")
