"""The target's own text for a distillation: generated here, or by a running service.

DistillSpec (Zhou et al. 2023, arXiv 2310.08461) trains on text of the target or of the draft. This
is text of the target, because that is where verification compares the two.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers

from outrider_bench.distill.rows import Row

if TYPE_CHECKING:
    from outrider.client import AsyncClient

# transformers' annotations are partial.
_untyped: Any = transformers

# Decoded in one forward pass, or requests that a service has at a time. Small models are decoded
# in larger batches: on a CPU 128 rows took two thirds of the time of four batches of 32.
_JOBS_AT_ONCE = 32
_JOBS_OF_SMALL_MODELS = 128
_SMALL_MODEL = 10**9  # parameters


@dataclass(frozen=True)
class Job:
    """One continuation to generate. `temperature` 0 is greedy."""

    prompt_ids: tuple[int, ...]
    temperature: float


def training_jobs(
    prompts: Sequence[Sequence[int]], temperatures: Sequence[float], num_rows: int
) -> list[Job]:
    """At most `num_rows` jobs, the temperatures evenly; each prompt is continued greedily once."""
    jobs: list[Job] = []
    for repetition in range(-(-num_rows // len(prompts))):
        for index, ids in enumerate(prompts):
            temperature = temperatures[(index + repetition) % len(temperatures)]
            job = Job(tuple(ids), temperature)
            if temperature > 0 or repetition < len(temperatures):
                jobs.append(job)
    return jobs[:num_rows]


def held_out_jobs(prompts: Sequence[Sequence[int]]) -> list[Job]:
    """Each prompt greedily and at temperature 1: acceptance is measured for both."""
    return [Job(tuple(ids), temperature) for ids in prompts for temperature in (0.0, 1.0)]


def batches(jobs: Sequence[Job], seed: int, size: int = _JOBS_AT_ONCE) -> list[list[Job]]:
    """The jobs in batches of similar prompt length; the batches in random order."""
    by_length = sorted(jobs, key=lambda job: len(job.prompt_ids))
    parts = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.Random(seed).shuffle(parts)
    return parts


class Generate(Protocol):
    """Generates the rows of a batch of jobs; `jobs_at_once`: its size."""

    @property
    def jobs_at_once(self) -> int: ...

    def __call__(self, jobs: Sequence[Job], seed: int) -> list[Row]: ...


class OwnTarget:
    """Generates with a loaded model. Callable: jobs of a batch and its seed → rows.

    Replaces the model's generation defaults: its penalties and filters do not apply.
    """

    def __init__(self, model: Any, *, max_tokens: int) -> None:
        self._model = model
        is_small = model.num_parameters() < _SMALL_MODEL
        self.jobs_at_once = _JOBS_OF_SMALL_MODELS if is_small else _JOBS_AT_ONCE
        self._eos_ids = _eos_ids(model)
        model.generation_config = _untyped.GenerationConfig(
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=self._eos_ids or None,
            pad_token_id=self._eos_ids[0] if self._eos_ids else 0,
        )

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job], seed: int) -> list[Row]:
        device = next(iter(self._model.parameters())).device
        temperatures = torch.tensor([job.temperature for job in jobs], device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            outputs = self._continue([job.prompt_ids for job in jobs], temperatures, device)
        return [
            Row(job.prompt_ids + tuple(ids), len(job.prompt_ids), job.temperature)
            for job, ids in zip(jobs, outputs, strict=True)
        ]

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: torch.Tensor,
        device: torch.device,
    ) -> list[list[int]]:
        """Continues each prompt up to an end token, padded on the left to a common length."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
                            device=device)  # fmt: skip
        processor = _PerRowTemperature(temperatures)
        # On CPUs in float32, as services run there: greedy text is the service's own.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = self._model.generate(ids, attention_mask=mask, logits_processor=[processor])
        return [_until_end(row, self._eos_ids) for row in tokens[:, longest:].tolist()]


class _PerRowTemperature:
    """Adds Gumbel noise times a row's temperature T: the argmax samples softmax(logits / T)."""

    def __init__(self, temperatures: torch.Tensor) -> None:
        self._temperatures = temperatures[:, None]

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        noise = -torch.empty_like(scores).exponential_().log()
        return scores + self._temperatures * noise


def _eos_ids(model: Any) -> list[int]:
    for source in (model.generation_config, model.config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, list | tuple) else [int(ids)]
    return []


def _until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens up to the first end token, which is kept: the target chose it too."""
    for index, token_id in enumerate(ids):
        if token_id in eos_ids:
            return ids[: index + 1]
    return ids


class RunningService:
    """Generates with an orchestrator's service, whose target must be the one to distil.

    Callable like `OwnTarget`; raises CallFailed.
    """

    jobs_at_once = _JOBS_AT_ONCE

    def __init__(self, endpoint: str, access: Any, *, max_tokens: int) -> None:
        self._endpoint = endpoint
        self._access = access
        self._max_tokens = max_tokens

    def __call__(self, jobs: Sequence[Job], seed: int) -> list[Row]:
        return asyncio.run(self._generate(jobs, seed))

    async def _generate(self, jobs: Sequence[Job], seed: int) -> list[Row]:
        from outrider.client import AsyncClient

        async with AsyncClient(self._endpoint, access=self._access) as client:
            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [
                        tasks.create_task(self._one(client, job, seed + index))
                        for index, job in enumerate(jobs)
                    ]
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
        return [task.result() for task in running]

    async def _one(self, client: AsyncClient, job: Job, seed: int) -> Row:
        stream = client.generate(
            job.prompt_ids, temperature=job.temperature, seed=seed, max_tokens=self._max_tokens
        )
        output = await stream.result()
        token_ids = job.prompt_ids + tuple(output.token_ids)
        return Row(token_ids, len(job.prompt_ids), job.temperature)


def generate_rows(
    generate: Generate, parts: Sequence[Sequence[Job]], *, num_done: int, seed: int
) -> Iterator[list[Row]]:
    """Generates the rows of the batches, without the first `num_done` rows.

    The seed of a batch depends on its place: a run that goes on generates what one run would.
    """
    for index, part in enumerate(parts):
        missing = part[num_done:] if num_done else part
        num_done = max(0, num_done - len(part))
        if missing:
            yield generate(missing, seed + 100_003 * index)
