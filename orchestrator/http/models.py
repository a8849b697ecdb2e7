"""The served model by its names in HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.http.errors import Refused
from orchestrator.replicas.models import Limits
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink


class Models:
    """Names of the target. `names`: those of the operator; empty: the target's own."""

    def __init__(
        self,
        targets: ReplicaPool[TargetLink],
        names: Sequence[str],
        limits: Callable[[], Limits],
    ) -> None:
        self._targets = targets
        self._names = names
        self._limits = limits
        self._created = int(time.time())

    @property
    def names(self) -> Sequence[str]:
        if self._names:
            return self._names
        model = self._targets.model
        assert model is not None, "a target was connected"
        return (model.name,)

    def checked(self, name: str | None) -> str:
        """The name for the response; unset: the first. Raises Refused for another model's name."""
        names = self.names
        if not name or name in names:
            return name or names[0]
        raise Refused(
            f"model: {name!r} is not served here; {' or '.join(names)}, or unset",
            404, "model", "model_not_found",
        )  # fmt: skip

    def cards(self) -> list[dict[str, Any]]:
        """Descriptions of `/v1/models`, one per name."""
        names, limits = self.names, self._limits()
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "outrider",
                "root": names[0],
                "parent": None,
                "max_model_len": limits.max_context_len,
            }
            for name in names
        ]
