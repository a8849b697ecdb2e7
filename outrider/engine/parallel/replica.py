"""Rank 0: starts the other ranks, loads its part of the model, and records what they replay."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from typing import Any

import torch

from outrider.engine.engine import Engine
from outrider.engine.loading import checkpoint, load, placement
from outrider.engine.options import EngineOptions
from outrider.engine.parallel.group import Place, RankGroup, listening_store
from outrider.engine.parallel.operations import OperationLog
from outrider.engine.parallel.plan import check_plan
from outrider.engine.parallel.processes import RankProcesses
from outrider.errors import ConfigError
from outrider.replica import split_address

_log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_OPTIONS = "outrider/options"
_started: list[RankProcesses] = []


def load_engine(options: EngineOptions) -> Engine:
    """Load a model over `options.tensor_parallel_size` ranks. Call it on the device thread.

    The ranks end with this thread, and when another engine with ranks is loaded: torch has one
    process group. If one ends before, fails or does not answer, this process ends.
    Raises as `loading.load.load_engine`.
    """
    device = _checked_device(options)
    size = options.tensor_parallel_size
    check_plan(options.model, checkpoint.load_config(options.model), size)
    if device.type == "cpu":
        options = _for_cpu(options)
    given = options.tensor_parallel_address
    host, port = split_address(given) if given else (_LOOPBACK, 0)
    store = _listening_store(options, host.strip("[]"), port)
    store.set(_OPTIONS, json.dumps(asdict(options), default=sorted))
    num_local = 1 if given else size
    if not given:  # the ranks inherit it; gloo would listen on the address of the host's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while _started:
        _started.pop().kill()
    processes = RankProcesses(host, store.port, num_local)
    _started.append(processes)
    try:
        group = RankGroup.join(store, Place(0, size, 0, num_local), device.type)
        log = OperationLog(group.send, processes.end_replica)
        return load.load_engine(options, group, log)
    except BaseException:
        processes.kill()
        raise


def _listening_store(options: EngineOptions, host: str, port: int) -> Any:
    try:
        return listening_store(host, port)
    except OSError as error:
        raise ConfigError(
            f"tensor_parallel_address: {options.tensor_parallel_address}: cannot listen: {error}"
        ) from error


def _for_cpu(options: EngineOptions) -> EngineOptions:
    """The ranks share the cores, and their sharded weights cannot be prepacked."""
    if options.prepack:
        _log.warning("tensor parallelism on CPU: the weights of linear layers are not prepacked")
    num_local = 1 if options.tensor_parallel_address else options.tensor_parallel_size
    num_threads = max(1, torch.get_num_threads() // num_local)
    return replace(options, prepack=False, num_threads=options.num_threads or num_threads)


def sent_options(store: Any) -> EngineOptions:
    """Options of rank 0, on another rank."""
    fields = json.loads(store.get(_OPTIONS))
    fields["forbid_kernels"] = frozenset(fields["forbid_kernels"])
    fields["tokenizer_eos_ids"] = tuple(fields["tokenizer_eos_ids"])
    return EngineOptions(**fields)


def _checked_device(options: EngineOptions) -> torch.device:
    """The kind of device of all ranks. Raises ConfigError for options that contradict ranks."""
    size = options.tensor_parallel_size
    device = placement.served_device(options.device)
    num_devices = torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(
            f"device: {options.device!r} is one device; tensor_parallel_size {size} uses the first "
            f"{size} CUDA devices: use auto or cuda, and CUDA_VISIBLE_DEVICES to choose them"
        )
    if device.type == "cuda" and num_devices < size and not options.tensor_parallel_address:
        raise ConfigError(f"tensor_parallel_size: {size} needs as many CUDA devices; "
                          f"{num_devices} present")  # fmt: skip
    if device.type == "cpu" and num_devices:
        raise ConfigError(
            f"device: 'cpu' with tensor_parallel_size {size} on a machine with CUDA devices: "
            "hide them (CUDA_VISIBLE_DEVICES=), because transformers would use them"
        )
    return device
