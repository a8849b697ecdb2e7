"""Trains the quickstart pair from scratch: tokenizer, target, distilled draft, files.

Owns the order of the work, the seeds and the files. Reproducible up to floating-point order: the
same seed, standard library and number of steps give the same pair. A wall-clock limit that ends
training early is not reproducible. `evaluate` measures; `make` is used by the command line.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from outrider_bench.distill.checkpoint import Checkpoint
from outrider_bench.distill.optimise import (
    ENDLESS,
    Interrupted,
    Limits,
    Optimiser,
    Position,
    Progress,
    optimise,
)
from outrider_bench.quickstart.architecture import (
    DRAFT_SHAPE,
    TARGET_SHAPE,
    ModelShape,
    llama_config,
    new_model,
)
from outrider_bench.quickstart.corpus import (
    END,
    END_OF_TEXT,
    Corpus,
    chat_documents,
    encode_documents,
    load_corpus,
    random_windows,
    train_tokenizer,
)
from outrider_bench.quickstart.distill import DistillConfig, distill, write_rollouts
from outrider_bench.quickstart.storage import load, load_tokenizer, save

# Training rows x tokens: mostly short, some as long as the positions, so that the target has seen
# 2048 tokens of context. Every entry costs about the same.
_WINDOWS = ((8, 512), (8, 512), (8, 512), (4, 1024), (8, 512), (8, 512), (8, 512), (2, 2048))
_TARGET_LIMITS = Limits(num_steps=1100, time_budget_s=3600.0)
# Of `lasting`: time of the target, of its continuations, and of the draft.
_SHARES = (0.65, 0.1, 0.25)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines a pair. The defaults train at least as long as the shipped pair.

    The shipped pair was stopped by wall-clock limits; its `CARD.md` has the number of steps.
    """

    seed: int = 1
    vocab_size: int = 4096
    target_shape: ModelShape = TARGET_SHAPE
    draft_shape: ModelShape = DRAFT_SHAPE
    target_limits: Limits = _TARGET_LIMITS
    windows: tuple[tuple[int, int], ...] = _WINDOWS
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    distill: DistillConfig = field(default_factory=DistillConfig)
    # Installed packages whose sources are added to the standard library.
    packages: tuple[str, ...] = ()

    def lasting(self, hours: float) -> TrainingConfig:
        """The same training for about this long: limited by time, not by steps."""
        target_s, rollouts_s, draft_s = (share * hours * 3600.0 for share in _SHARES)
        return replace(
            self,
            target_limits=Limits(ENDLESS, target_s),
            distill=replace(
                self.distill,
                num_rollouts=ENDLESS,
                rollout_budget_s=rollouts_s,
                limits=Limits(ENDLESS, draft_s),
            ),
        )


@dataclass(frozen=True)
class TrainingResult:
    """Steps taken, which wall-clock limits may have cut; 0 for a target that was not trained.

    `is_cut`: Ctrl-C ended the training; a model with steps was saved in its state then.
    """

    num_target_steps: int
    num_draft_steps: int
    is_cut: bool = False

    def sentence(self) -> str:
        """One sentence for the card."""
        end = " Interrupted by Ctrl-C." if self.is_cut else ""
        steps = f"target {self.num_target_steps:,}, draft {self.num_draft_steps:,}"
        return f"Steps taken: {steps}.{end}"


def train(
    output_dir: Path,
    config: TrainingConfig | None = None,
    *,
    corpus: Corpus | None = None,
    trained_target: Path | None = None,
    progress: Progress | None = None,
) -> TrainingResult:
    """Trains a pair and writes `output_dir/target` and `output_dir/draft`.

    With `trained_target` (a directory of an earlier run) that target and tokenizer are used, and
    only the draft is trained. Ctrl-C saves the model in training and ends the training. A run that
    was interrupted or killed goes on with the same call: its state is in `output_dir/checkpoints`
    until the pair is complete.
    """
    config = config or TrainingConfig()
    steps = {"target": 0, "draft": 0}
    generator = torch.Generator().manual_seed(config.seed)
    checkpoints = {
        part: Checkpoint(output_dir / "checkpoints" / f"{part}.pt", generator) for part in steps
    }
    try:
        corpus = corpus or load_corpus(packages=config.packages)
        target_dir = output_dir / "target"
        known = trained_target or (target_dir if checkpoints["target"].exists else None)
        tokenizer = (
            load_tokenizer(known) if known else train_tokenizer(corpus.train, config.vocab_size)
        )
        stream = _training_stream(tokenizer, corpus)
        if trained_target is None:
            steps["target"] = _train_target(
                tokenizer, stream, config, target_dir, checkpoints["target"], generator, progress
            )
        elif trained_target.resolve() != target_dir.resolve():
            save(load(trained_target), tokenizer, target_dir)
        steps["draft"] = _train_draft(
            tokenizer, stream, config, output_dir, checkpoints["draft"], generator, progress
        )
    except Interrupted as error:
        steps[error.stage] = error.num_steps
    except KeyboardInterrupt:  # nothing to save yet
        pass
    else:
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
        return TrainingResult(steps["target"], steps["draft"])
    return TrainingResult(steps["target"], steps["draft"], is_cut=True)


def _training_stream(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> torch.Tensor:
    return encode_documents(tokenizer, [*corpus.train, *chat_documents(corpus.train)])


def _config(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return llama_config(
        shape,
        vocab_size=len(tokenizer),
        end_of_text_id=_token_id(tokenizer, END_OF_TEXT),
        end_of_turn_id=_token_id(tokenizer, END),
    )


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int), "one token has one id"
    return token_id


def _train_target(
    tokenizer: PreTrainedTokenizerFast,
    stream: torch.Tensor,
    config: TrainingConfig,
    target_dir: Path,
    checkpoint: Checkpoint,
    generator: torch.Generator,
    progress: Progress | None,
) -> int:
    model = new_model(_config(config.target_shape, tokenizer), config.seed)
    optimiser = Optimiser(model, matrix_rate=config.matrix_rate, other_rate=config.other_rate)

    def loss_of_step(step: int) -> torch.Tensor:
        rows, tokens = config.windows[step % len(config.windows)]
        return next_token_loss(model, random_windows(stream, rows, tokens + 1, generator))

    def save_both(position: Position) -> None:
        save(model, tokenizer, target_dir)
        checkpoint.save(model, optimiser, position)

    position = optimise(
        "target",
        optimiser,
        loss_of_step,
        config.target_limits,
        start=checkpoint.load(model, optimiser),
        progress=progress,
        checkpoint=save_both,
    )
    save_both(position)
    return position.num_steps


def _train_draft(
    tokenizer: PreTrainedTokenizerFast,
    stream: torch.Tensor,
    config: TrainingConfig,
    output_dir: Path,
    checkpoint: Checkpoint,
    generator: torch.Generator,
    progress: Progress | None,
) -> int:
    # The teacher is the target as saved, rounded to bfloat16, not as trained.
    target = load(output_dir / "target")
    rollouts = write_rollouts(target, stream, config.distill, generator, progress)
    draft = new_model(_config(config.draft_shape, tokenizer), config.seed + 1)
    try:
        num_steps = distill(
            target, draft, stream, rollouts, config.distill, checkpoint, generator, progress
        )
    except Interrupted:
        save(draft, tokenizer, output_dir / "draft")
        raise
    save(draft, tokenizer, output_dir / "draft")
    return num_steps


def next_token_loss(model: LlamaForCausalLM, token_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats per token over `token_ids`: int64 [rows, tokens]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), token_ids[:, 1:].flatten())
