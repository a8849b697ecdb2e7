"""An engine over two ranks: logits of one rank, by a replayed log; models it refuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from outrider.engine import Append, Engine, EngineOptions, load_engine
from outrider.engine.loading import checkpoint
from outrider.engine.parallel.plan import check_plan
from outrider.errors import ConfigError, ModelError
from tests.deploy.api_server import free_ports
from tests.engine.attention.test_equivalence import Driver
from tests.engine.loading.test_families import check_ragged_steps
from tests.engine.reference import Reference, Shadow
from tests.families import MODELS, save_family

NUM_KV_TOKENS = 1024

# Tied embeddings and biases; soft-caps and windows; a plan that leaves all KV heads on every rank.
FAMILIES = ("qwen2", "gemma2", "phi3")


@pytest.fixture(scope="module")
def device() -> Iterator[ThreadPoolExecutor]:
    """The thread that loads the engines: the ranks of the last one end with it."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        yield thread


@contextlib.contextmanager
def started_rank(address: str) -> Iterator[None]:
    """Rank 1, started before rank 0 listens; it ends when rank 0 has."""
    host, port = address.split(":")
    words = ["--host", host, "--port", port, "--rank", "1"]
    module = "outrider.engine.parallel.rank"
    with subprocess.Popen([sys.executable, "-m", module, *words]) as process:
        try:
            yield
        finally:
            process.kill()


@pytest.fixture(params=FAMILIES)
def pair(
    request: pytest.FixtureRequest,
    engine_of: Callable[[str], Engine],
    model_dir: Callable[[str], Path],
    device: ThreadPoolExecutor,
) -> Iterator[tuple[Engine, Engine, Driver]]:
    """The engine of one process, that of two ranks, and a driver of the second."""
    family: str = request.param
    path = model_dir(family)
    fields: dict[str, Any] = {"kv_cache_tokens": NUM_KV_TOKENS, "num_threads": 1}
    with contextlib.ExitStack() as stack:
        if family == "phi3":  # as if on another machine
            fields["tensor_parallel_address"] = address = f"127.0.0.1:{free_ports(1)[0]}"
            stack.enter_context(started_rank(address))
        options = EngineOptions(str(path), tensor_parallel_size=2, **fields)
        engine = device.submit(load_engine, options).result(200)
        driver = Driver(engine, Shadow(Reference(path), seed=1), seed=2)
        yield engine_of(family), engine, driver


@pytest.mark.slow
def test_two_ranks_compute_the_logits_of_one(pair: tuple[Engine, Engine, Driver]) -> None:
    """Prefill, decoding, verification, roll-back, forks, moves and frees, replayed by rank 1.

    Rank 1 knows of them only what the log says; the driver checks every row of logits.
    """
    one, two, driver = pair
    assert two.info.tensor_parallel_size == 2
    assert two.info.model_fingerprint == one.info.model_fingerprint
    assert two.info.num_parameters == one.info.num_parameters
    num_shares = 1 if one.info.architecture == "phi3" else 2
    for whole, part in zip(one.store.keys, two.store.keys, strict=True):
        assert part.shape[1] * num_shares == whole.shape[1], "KV heads of a rank"
    parent = driver.open(64)
    driver.step([(parent, 37, 1)])
    child = driver.fork(parent, 90)  # copies the rows of a page
    driver.step([(child, 5, 5), (parent, 5, 5)])
    driver.truncate(child, 18)
    driver.truncate(parent, 20)  # into a shared page: copied on write
    driver.step([(child, 30, 3), (parent, 2, 0)])
    driver.free(parent)
    driver.step([(child, 2, 2)])  # moved to consecutive pages
    for _ in range(12):
        driver.random_change()
        driver.random_step()
    cached = driver.shadow.random_tokens(64)
    first, second = (two.store.open(80) for _ in range(2))
    two.forward([Append(first, cached, 0)])
    two.store.cache_prefix(first, cached)
    assert two.store.reuse_prefix(second, cached) == 64
    next_ids = driver.shadow.random_tokens(3)
    rows = two.forward([Append(second, next_ids, 3)])
    driver.shadow.assert_rows(rows, cached + next_ids, "after a cached prefix")


@pytest.mark.slow
@pytest.mark.skipif(
    "OUTRIDER_TEST_RANKS" not in os.environ,
    reason="ten seconds a family: for a new version of transformers or torch",
)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_family_is_sharded_or_refused(
    model_type: str, tmp_path: Path, device: ThreadPoolExecutor
) -> None:
    """Families of the table of supported models: logits of one rank, or refused by the plan."""
    save_family(model_type, tmp_path)
    options = EngineOptions(
        str(tmp_path), kv_cache_tokens=256, num_threads=1, tensor_parallel_size=2
    )
    try:
        check_plan(model_type, checkpoint.load_config(options.model), 2)
    except ModelError:
        with pytest.raises(ModelError, match="tensor_parallel_size"):
            load_engine(options)
        return
    engine = device.submit(load_engine, options).result(200)
    check_ragged_steps(engine, tmp_path, model_type)


@pytest.mark.parametrize(
    ("family", "size", "why"),
    [
        ("gpt2", 2, "no tensor-parallel plan for the layers of gpt2"),
        ("llama", 4, "4 does not divide num_key_value_heads (2)"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused(
    model_dir: Callable[[str], Path], family: str, size: int, why: str
) -> None:
    """Before any rank is started."""
    with pytest.raises(ModelError) as error:
        load_engine(EngineOptions(str(model_dir(family)), tensor_parallel_size=size))
    assert why in str(error.value)


def test_a_single_device_is_refused(model_dir: Callable[[str], Path]) -> None:
    options = EngineOptions(str(model_dir("llama")), device="cuda:0", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="device"):
        load_engine(options)
