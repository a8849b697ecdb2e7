"""Tensor-parallel settings, a base class for the settings of the model services (`services`)."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.settings.addresses import require_address
from outrider.settings.fields import require, setting

# Settings that place the model in another way.
_OTHER_PLACEMENTS = ("device_map", "inflate_parameters")


@dataclass(frozen=True)
class ParallelSettings:
    """How many processes share the model."""

    tensor_parallel_size: int = setting(
        1, "processes that share the model, each with a part of every layer; one per CUDA device"
    )
    tensor_parallel_address: str | None = setting(
        None,
        "host:port to listen on for these processes, which you start yourself, on other machines; "
        "unset: they are started on this one",
    )
    tensor_parallel_timeout_s: float = setting(
        30.0, "seconds to wait for one of these processes in a pass before the program exits"
    )

    def check_parallel(self) -> None:
        """Checks these settings. Raises ConfigError."""
        require(self.tensor_parallel_size >= 1, "tensor_parallel_size", "must be 1 or more")
        is_time = 0 < self.tensor_parallel_timeout_s < 86_400
        require(is_time, "tensor_parallel_timeout_s", "must be above 0 and below 86400")
        if self.tensor_parallel_address is not None:
            require_address(self.tensor_parallel_address, "tensor_parallel_address")
            is_used = self.tensor_parallel_size > 1
            require(is_used, "tensor_parallel_address", "needs tensor_parallel_size above 1")
        for name in _OTHER_PLACEMENTS if self.tensor_parallel_size > 1 else ():
            why = f"cannot be combined with {name}"
            require(getattr(self, name, None) is None, "tensor_parallel_size", why)
