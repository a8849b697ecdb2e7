"""Choice of the attention backend and of CUDA graphs for a loaded model.

FlashInfer is used where it supports the model, torch's kernels otherwise. CUDA graphs are used if
they are measured to be faster. The self-test (`loading/self_test.py`) then checks the results.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
from collections.abc import Sequence as Seq

import torch

from outrider.engine.attention.cuda_graphs import GraphedSteps
from outrider.engine.attention.flashinfer_backend import FlashInferBackend
from outrider.engine.attention.interface import AttentionStub, LayerCall, attending
from outrider.engine.attention.segments import Backend
from outrider.engine.attention.torch_backend import TorchBackend
from outrider.engine.engine import Engine
from outrider.engine.interface import Append
from outrider.engine.kv.store import KVStore, LayerLayout
from outrider.engine.loading.loaded_model import BoundModel
from outrider.errors import ConfigError, installs

_log = logging.getLogger(__name__)

TORCH = "torch"
FLASHINFER = "flashinfer"
CHOICES = ("auto", TORCH, FLASHINFER)

# Supported by both generations of FlashInfer's kernels (fa2, fa3).
_DTYPES = {torch.bfloat16, torch.float16}
_DIMS = {64, 128, 256}
_MIN_CAPABILITY = (8, 0)

# Measurement for the choice of graphs: cached tokens, and steps measured each way.
_CONTEXT_LEN = 32
_NUM_STEPS = 15

# Graphs use fa2; other steps use the kernel FlashInfer picks. In standard deviations of the logits,
# as in the self-test for low precision.
_GRAPH_TOLERANCE = 0.5


def choose(requested: str, model: BoundModel, layers: Seq[LayerLayout]) -> str:
    """TORCH or FLASHINFER. Raises ConfigError if `requested` is unknown or cannot be served."""
    if requested not in CHOICES:
        raise ConfigError(
            f"attention_backend: {requested!r} is unknown; expected {', '.join(CHOICES)}"
        )
    if requested == TORCH:
        return TORCH
    obstacle = _flashinfer_obstacle(model, layers)
    if obstacle is None:
        return FLASHINFER
    if requested == FLASHINFER:
        raise ConfigError(f"attention_backend: {requested!r} cannot be used: {obstacle}")
    if layers[0].device.type == "cuda":
        _log.info("attention by torch, not by FlashInfer: %s", obstacle)
    return TORCH


def make(name: str, model: BoundModel, store: KVStore) -> Backend:
    """Create the named backend for this store."""
    if name == FLASHINFER:
        return FlashInferBackend(store, model.windows)
    return TorchBackend(store, model.windows)


def choose_graphs(engine: Engine, model: BoundModel, backend: Backend) -> GraphedSteps | None:
    """CUDA graphs for single-token steps if they work, give the same logits and are faster."""
    if not isinstance(backend, FlashInferBackend):
        return None
    graphs = GraphedSteps(model, backend)
    graphed = Engine(model, engine.store, engine.info, backend, graphs)
    plain_s, expected = _measure(engine, model)
    graphed_s, logits = _measure(graphed, model)
    if graphs.failed:
        return None
    difference = float((logits - expected).abs().nan_to_num(torch.inf).max())
    if not difference <= _GRAPH_TOLERANCE * float(expected.std()):
        _log.warning("CUDA graphs not used: their logits differ by %.3g", difference)
        return None
    faster = graphed_s < plain_s
    _log.info(
        "a single-token step takes %.2f ms, from a CUDA graph %.2f ms: graphs are %s",
        plain_s * 1e3, graphed_s * 1e3, "on" if faster else "off",
    )  # fmt: skip
    return graphs if faster else None


def _measure(engine: Engine, model: BoundModel) -> tuple[float, torch.Tensor]:
    """Median seconds of a single-token step of one sequence, and its logits."""
    context_len = min(_CONTEXT_LEN, model.max_context_len - 1)
    sequence = engine.store.open(context_len + 1)
    engine.forward([Append(sequence, [0] * context_len, 0)])
    durations_s = []
    for _ in range(_NUM_STEPS):
        torch.cuda.synchronize(engine.store.keys[0].device)
        started_at = time.perf_counter()
        logits = engine.forward([Append(sequence, [0], 1)])
        torch.cuda.synchronize(engine.store.keys[0].device)
        durations_s.append(time.perf_counter() - started_at)
        engine.store.truncate(sequence, context_len)
    engine.store.free(sequence)
    return statistics.median(durations_s), logits


def _flashinfer_obstacle(model: BoundModel, layers: Seq[LayerLayout]) -> str | None:
    """Why FlashInfer cannot serve this model; None if it can."""
    devices = {layer.device for layer in layers}
    if any(device.type != "cuda" for device in devices):
        return "the model is not on a CUDA device"
    if len(devices) > 1:
        return "the model's layers are on several devices"
    if importlib.util.find_spec("flashinfer") is None:
        return f"flashinfer is not installed; {installs('gpu')}"
    capability = torch.cuda.get_device_capability(layers[0].device)
    if capability < _MIN_CAPABILITY:
        return f"the device's compute capability {capability} is below {_MIN_CAPABILITY}"
    for layer in layers:
        if layer.dtype not in _DTYPES:
            return f"the model is {layer.dtype}; FlashInfer supports bfloat16 and float16"
        if layer.key_dim != layer.value_dim or layer.key_dim not in _DIMS:
            dims = f"{layer.key_dim} and {layer.value_dim}"
            return f"keys and values have {dims} dimensions; FlashInfer supports 64, 128 and 256"
    return "the model has attention sinks" if _has_sinks(model) else None


def _has_sinks(model: BoundModel) -> bool:
    """Whether any layer passes attention sinks, found with a pass over one token."""
    has_sinks = False

    def note_sinks(
        module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, call: LayerCall
    ) -> None:
        nonlocal has_sinks
        has_sinks |= call.sinks is not None

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode(), attending(AttentionStub(note_sinks)):
        model(token, token, 0)
    return has_sinks
