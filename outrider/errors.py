"""Error hierarchy. `outrider.runtime.grpc_status` maps it to gRPC status codes.

OutriderError
 ├─ InvalidRequest       a field of the request is invalid; names the field
 ├─ ConfigError          a flag, environment variable or file of the operator is invalid
 │   ├─ ModelError       a model cannot be loaded or served correctly
 │   └─ IncompatiblePair models or vocabularies of replicas do not match
 ├─ Unauthenticated      API key missing or unknown
 ├─ PermissionDenied     the client is authenticated but not allowed to do this
 ├─ SessionNotFound
 ├─ SessionInUse         another request holds the session's lease
 ├─ UnreadableRecord     a session's record in Redis cannot be used by this version
 ├─ LeaseLost            the session has a later owner; this writer is fenced off
 ├─ CapacityExceeded     no capacity now; may be retried later
 │   ├─ KVFull           no free KV pages for the sequence now
 │   └─ StepOutOfMemory  no memory for a forward pass of this size
 ├─ KVNeverFits          the sequence is longer than the replica's whole KV cache
 ├─ ClientStalled        the client has not read its stream for too long
 ├─ KVLost               KV that the request refers to is gone
 ├─ Unavailable          a tier or the store cannot be reached
 │   └─ ReplicaLost      a replica was lost while it processed the request
 ├─ CallFailed           for clients: status, message and refused field of a failed call
 │   └─ ResumeFailed     no orchestrator resumed a broken stream
 └─ InternalError        a defect of Outrider, with a description
     └─ NonFiniteLogits  the model computed NaN or infinity
"""

from __future__ import annotations

from collections.abc import Sequence


def installs(extra: str) -> str:
    """The command that installs an optional extra. Outrider is not on any package index."""
    return f"in a clone of Outrider, run: pip install '.[{extra}]'"


NO_ENGINE = f"models need torch, which is not installed; {installs('model')}"


class OutriderError(Exception):
    """Base class of all errors raised on purpose.

    `shown` is safe to send to any client. `str(error)` is for operators and logs.
    """

    @property
    def shown(self) -> str:
        return str(self)


class _Detailed(OutriderError):
    """Error with a detail for operators only: addresses, Redis replies, causes."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message, detail)
        self._message = message
        self._detail = detail

    def __str__(self) -> str:
        return f"{self._message}: {self._detail}" if self._detail else self._message

    @property
    def shown(self) -> str:
        return self._message


class InvalidRequest(OutriderError):
    """A field of the request is invalid. `field` is its path in the request."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


class ConfigError(OutriderError):
    """The operator's configuration is invalid. Programs print the error and exit with status 2."""


class ModelError(ConfigError):
    """A model cannot be loaded, or cannot be served correctly by this engine."""


class IncompatiblePair(ConfigError):
    """A replica's model or vocabulary does not match the other replicas."""


class Unauthenticated(OutriderError):
    """The client's API key is missing or unknown."""


class PermissionDenied(OutriderError):
    """The client is not allowed to call this method."""


class SessionNotFound(OutriderError):
    """The session does not exist or has expired."""


class SessionInUse(OutriderError):
    """Another request holds the session's lease."""


class UnreadableRecord(OutriderError):
    """The session's record in Redis cannot be read or written by this version."""


class LeaseLost(OutriderError):
    """The session has a later owner; this writer's data is discarded."""


class CapacityExceeded(OutriderError):
    """No capacity now. The same request may succeed after about `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KVFull(CapacityExceeded):
    """The KV budget has no room for the sequence now.

    `num_pages`: pages needed, if known, in addition to `shared_pages`, which it would share.
    """

    def __init__(self, message: str, num_pages: int = 0) -> None:
        super().__init__(message)
        self.num_pages = num_pages
        self.shared_pages: Sequence[int] = ()


class StepOutOfMemory(CapacityExceeded):
    """A forward pass, or sampling from it, did not fit into memory. Smaller ones may.

    `num_tokens`: 0 if it was sampling.
    """

    def __init__(self, num_tokens: int, num_rows: int, why: str) -> None:
        where = f"in a pass over {num_tokens} tokens with" if num_tokens else "when sampling from"
        super().__init__(f"out of memory {where} {num_rows} rows of logits: {why}")
        self.num_tokens = num_tokens
        self.num_rows = num_rows


class KVNeverFits(OutriderError):
    """The sequence is longer than a replica's whole KV budget."""


class ClientStalled(OutriderError):
    """The client has not read its stream for too long. A named session can be resumed."""


class KVLost(OutriderError):
    """The KV that the request refers to is gone; send the context again."""


class Unavailable(_Detailed):
    """A tier or the store cannot be reached. Retry after `retry_after_s`."""

    retry_after_s = 1.0


class ReplicaLost(Unavailable):
    """The replica died, was cut off or did not answer in time while it processed the request."""


class InternalError(_Detailed):
    """A defect of Outrider."""


class NonFiniteLogits(InternalError):
    """The model's logits are NaN or infinite, so no token can be sampled."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN or infinite (bad weights, or overflow: try another dtype)"
        )


class CallFailed(OutriderError):
    """A call failed: name of its gRPC status, then the server's message.

    `field`: the request's field that the server refused, if it named one. `retry_after_s`: after
    this time the same request may succeed; None: the server said nothing about it. `was_delivered`:
    False if no server can have received the call.
    """

    def __init__(
        self,
        message: str,
        *,
        was_delivered: bool = True,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.was_delivered = was_delivered
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> str:
        """Name of the gRPC status, for example UNAVAILABLE."""
        return str(self).partition(":")[0]


class ResumeFailed(CallFailed):
    """No orchestrator resumed a broken stream.

    `num_received` tokens were received; the session `session_id` has all that were recorded.
    `can_resume`: a later request may still resume it.
    """

    def __init__(self, why: str, session_id: str, num_received: int, *, can_resume: bool) -> None:
        super().__init__(f"{why}; {num_received} tokens were received")
        self.session_id = session_id
        self.num_received = num_received
        self.can_resume = can_resume
