"""Source of a model's files: a local directory, or a revision of a Hugging Face Hub repository."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from outrider.errors import ConfigError


@dataclass(frozen=True)
class ModelSource:
    """Where a model is. Every flag that names a model takes this: a directory, or NAME@REVISION.

    `name`: as the operator gave it, without the revision. `directory`: None for a Hub name.
    `revision`: branch, tag or commit on the Hub; None: its main branch.
    """

    name: str
    directory: Path | None
    revision: str | None = None

    @classmethod
    def parse(cls, model: str) -> ModelSource:
        """Splits off the revision. Raises ConfigError for a revision of a local directory."""
        if "@" not in model or Path(model).expanduser().exists():
            return cls(model, Path(model).expanduser() if _is_local(model) else None)
        name, _, revision = model.partition("@")
        if _is_local(name):
            raise ConfigError(
                f"revision: {name} is a local directory; only models on the Hugging Face Hub have "
                "revisions"
            )
        if not revision:
            raise ConfigError(f"revision: empty in {model!r}; give a branch, a tag or a commit")
        if "@" in revision:
            raise ConfigError(f"revision: given twice, {revision.replace('@', ' and ', 1)}")
        return cls(name, None, revision)


def _is_local(name: str) -> bool:
    """Whether the name is a directory's, or looks like a path as no Hub name does."""
    looks_local = name.startswith((".", "/", "~")) or name.count(os.sep) > 1
    return looks_local or Path(name).expanduser().is_dir()
