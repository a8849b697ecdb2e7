"""The one tree of errors. `outrider.runtime.grpc_status` maps it to gRPC status.

OutriderError
 ├─ InvalidRequest       a request's field is wrong; names the field
 ├─ ConfigError          a flag, variable or file of the operator is wrong
 │   ├─ ModelError       a model cannot be loaded or served correctly
 │   └─ IncompatiblePair replicas whose models or vocabularies do not fit together
 ├─ Unauthenticated      a caller has not shown a key that is known
 ├─ PermissionDenied     a caller is known, and may not do this
 ├─ SessionNotFound
 ├─ SessionInUse         another call holds the session's lease
 ├─ UnreadableRecord     what Redis holds of a session is not for this version to read
 ├─ LeaseLost            a later owner has taken the session: this writer is stale
 ├─ CapacityExceeded     no room now; may be retried later
 │   └─ KVFull           the KV budget has no room for it now
 ├─ KVNeverFits          it is longer than the whole KV budget
 ├─ ClientStalled        a client has not read its stream for too long
 ├─ KVLost               keys and values that a caller relied on are gone
 ├─ Unavailable          a tier or the store cannot be reached
 │   └─ ReplicaLost      a replica was lost while it had a request
 ├─ CallFailed           for clients: the status and message that a call ended with
 └─ InternalError        a defect on our side, by name
     └─ NonFiniteLogits  the model computed NaN or infinity
"""

from __future__ import annotations

from collections.abc import Sequence


def installs(extra: str) -> str:
    """The command that installs an optional part. Outrider is on no package index."""
    return f"in a clone of Outrider, run: pip install '.[{extra}]'"


NO_ENGINE = f"models need torch, which is not installed; {installs('engine')}"


class OutriderError(Exception):
    """Base of all errors raised on purpose.

    `shown` is what any client may be told. `str` of an error is for operators, and for logs.
    """

    @property
    def shown(self) -> str:
        return str(self)


class _Detailed(OutriderError):
    """With a detail that is for operators alone: addresses, answers of Redis, causes."""

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
    """A request's field is wrong. `field` is its path in the request."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


class ConfigError(OutriderError):
    """Something the operator gave is wrong; programs print it and exit with status 2."""


class ModelError(ConfigError):
    """A model cannot be loaded, or not served correctly by this engine."""


class IncompatiblePair(ConfigError):
    """A replica's model or vocabulary does not fit those of the others."""


class Unauthenticated(OutriderError):
    """The caller has shown no key, or none that is known."""


class PermissionDenied(OutriderError):
    """The caller is not one of those who may ask this."""


class SessionNotFound(OutriderError):
    """No such session, or it has expired."""


class SessionInUse(OutriderError):
    """Another call holds the session."""


class UnreadableRecord(OutriderError):
    """What Redis holds under a session's name cannot be read or written by this version."""


class LeaseLost(OutriderError):
    """A later owner has taken the session; nothing this writer sends is kept."""


class CapacityExceeded(OutriderError):
    """No room now; the same request may pass later, in `retry_after_s` by what is known."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KVFull(CapacityExceeded):
    """The KV budget has no room for the sequence now.

    `num_pages` are needed, where it is known, beside `shared_pages`, which it would share.
    """

    def __init__(self, message: str, num_pages: int = 0) -> None:
        super().__init__(message)
        self.num_pages = num_pages
        self.shared_pages: Sequence[int] = ()


class KVNeverFits(OutriderError):
    """The sequence is longer than all of a replica's KV budget: it never has room there."""


class ClientStalled(OutriderError):
    """The client has not read its stream for too long; a named session can be resumed."""


class KVLost(OutriderError):
    """Keys and values that the caller relied on are gone; send the context again."""


class Unavailable(_Detailed):
    """A tier or the store cannot be reached; it may be again in `retry_after_s`."""

    retry_after_s = 1.0


class ReplicaLost(Unavailable):
    """The replica died, was cut off or did not answer in time while it had the request."""


class InternalError(_Detailed):
    """A defect on our side."""


class NonFiniteLogits(InternalError):
    """The model's logits are NaN or infinite: no token can be sampled from them."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are NaN or infinite (bad weights, or overflow: try another dtype)"
        )


class CallFailed(OutriderError):
    """The server refused or failed: its status, then what it said.

    `was_heard`: false where nobody can have got the call.
    """

    def __init__(self, message: str, *, was_heard: bool = True) -> None:
        super().__init__(message)
        self.was_heard = was_heard

    @property
    def code(self) -> str:
        """The status' name, for instance UNAVAILABLE."""
        return str(self).partition(":")[0]
