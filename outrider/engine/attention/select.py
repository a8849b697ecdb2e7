"""Which way a loaded model attends: FlashInfer where it can, torch's own kernels elsewhere.

Owns the conditions and the choice of CUDA graphs, which are measured: on if faster. Whether a
choice computes rightly is the probe's to say (probe.py).
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
from outrider.engine.attention.interface import LayerCall, attending
from outrider.engine.attention.segments import Backend
from outrider.engine.attention.torch_backend import TorchBackend
from outrider.engine.engine import Append, Engine
from outrider.engine.kv.store import KVStore, LayerLayout
from outrider.engine.loading.loaded_model import BoundModel
from outrider.errors import ConfigError, installs

_log = logging.getLogger(__name__)

TORCH = "torch"
FLASHINFER = "flashinfer"
CHOICES = ("auto", TORCH, FLASHINFER)

# What FlashInfer's kernels of both generations (fa2, fa3) are made for.
_DTYPES = {torch.bfloat16, torch.float16}
_DIMS = {64, 128, 256}
_LEAST_CAPABILITY = (8, 0)

# For the choice of graphs: tokens cached before, and steps measured each way.
_CONTEXT_LEN = 32
_NUM_STEPS = 15

# Graphs use fa2, steps without them what FlashInfer picks: of the logits' standard deviation, as
# the probe's for low precision.
_GRAPH_TOLERANCE = 0.5


def choose(wanted: str, model: BoundModel, layers: Seq[LayerLayout]) -> str:
    """TORCH or FLASHINFER. Raises ConfigError for a wish that is unknown or cannot be had."""
    if wanted not in CHOICES:
        raise ConfigError(f"attention_backend {wanted!r}: expected {', '.join(CHOICES)}")
    if wanted == TORCH:
        return TORCH
    obstacle = _obstacle(model, layers)
    if obstacle is None:
        return FLASHINFER
    if wanted == FLASHINFER:
        raise ConfigError(f"attention_backend {wanted!r}: {obstacle}")
    if layers[0].device.type == "cuda":
        _log.info("attention is torch's, not FlashInfer's: %s", obstacle)
    return TORCH


def make(name: str, model: BoundModel, store: KVStore) -> Backend:
    """A back end by its name, for this store."""
    if name == FLASHINFER:
        return FlashInferBackend(store, model.windows)
    return TorchBackend(store, model.windows)


def choose_graphs(engine: Engine, model: BoundModel, backend: Backend) -> GraphedSteps | None:
    """Graphs for single-token steps, if they can be had, say the same and are faster."""
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
        _log.warning("no CUDA graphs: their logits differ by %.3g", difference)
        return None
    faster = graphed_s < plain_s
    _log.info(
        "a single-token step takes %.2f ms, %.2f ms from a CUDA graph: %s",
        plain_s * 1e3, graphed_s * 1e3, "on" if faster else "off",
    )  # fmt: skip
    return graphs if faster else None


def _measure(engine: Engine, model: BoundModel) -> tuple[float, torch.Tensor]:
    """Median seconds of one sequence's single-token step, and its logits."""
    context_len = min(_CONTEXT_LEN, model.max_context_len - 1)
    sequence = engine.store.open(context_len + 1)
    engine.forward([Append(sequence, [0] * context_len, 0)])
    took_s = []
    for _ in range(_NUM_STEPS):
        torch.cuda.synchronize(engine.store.keys[0].device)
        began = time.perf_counter()
        logits = engine.forward([Append(sequence, [0], 1)])
        torch.cuda.synchronize(engine.store.keys[0].device)
        took_s.append(time.perf_counter() - began)
        engine.store.truncate(sequence, context_len)
    engine.store.free(sequence)
    return statistics.median(took_s), logits


def _obstacle(model: BoundModel, layers: Seq[LayerLayout]) -> str | None:
    """Why FlashInfer cannot serve this model, or None."""
    devices = {layer.device for layer in layers}
    if any(device.type != "cuda" for device in devices):
        return "the model is not on a CUDA device"
    if len(devices) > 1:
        return "the model's layers are on several devices"
    if importlib.util.find_spec("flashinfer") is None:
        return f"flashinfer is not installed; {installs('gpu')}"
    capability = torch.cuda.get_device_capability(layers[0].device)
    if capability < _LEAST_CAPABILITY:
        return f"the device's compute capability {capability} is below {_LEAST_CAPABILITY}"
    for layer in layers:
        if layer.dtype not in _DTYPES:
            return f"the model is {layer.dtype}, and FlashInfer takes bfloat16 and float16"
        if layer.key_dim != layer.value_dim or layer.key_dim not in _DIMS:
            dims = f"{layer.key_dim} and {layer.value_dim}"
            return f"keys and values have {dims} dimensions, and FlashInfer takes 64, 128 or 256"
    return "the model has attention sinks" if _has_sinks(model) else None


def _has_sinks(model: BoundModel) -> bool:
    watcher = _Watcher()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.inference_mode(), attending(watcher):
        model(token, token, 0)
    return watcher.saw_sinks


class _Watcher:
    """Stands in for attention: notes what it is called with and answers zeros."""

    def __init__(self) -> None:
        self.saw_sinks = False

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        self.saw_sinks |= call.sinks is not None
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
