"""`outrider drafts list | promote | roll-back | retry`: the draft revisions of a tier.

`list` asks an orchestrator. The other commands write to Redis, with the orchestrator's own settings
from its environment variables: operators have these settings, clients do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.cli.sessions import JsonOptions, send, show
from outrider.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from outrider.draft_rollout import Rollout
    from outrider.redis.rollout_store import RolloutStore
    from outrider.settings.redis_address import RedisAddress

drafts = typer.Typer(
    help="List, promote or roll back the draft revisions of a tier.", no_args_is_help=True
)

_MAX_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class OperatorOptions:
    revision: Annotated[str, typer.Argument(help="Name of the draft revision.")]
    redis_url: Annotated[
        str | None,
        typer.Option(
            help="Redis of the orchestrators. Default: the orchestrator's own settings, from the "
            "variables OUTRIDER_ORCHESTRATOR_REDIS_… or REDIS_URL."
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            help="First 12 characters of the target's fingerprint, if several targets use the "
            "Redis."
        ),
    ] = None


@drafts.command("list")
@takes(JsonOptions)
def list_drafts(options: JsonOptions) -> None:
    """List the draft revisions: role, replicas, acceptance rate in the current comparison."""
    from rich.console import Console
    from rich.table import Table

    from outrider.client.info import DraftRollout

    rollout = send(options, lambda client: client.models()).draft_rollout
    rollout = rollout or DraftRollout(0, [], "")
    if options.json:
        show(rollout, as_json=True)
        return
    table = Table(show_edge=False)
    for name in ("revision", "model", "role", "replicas", "generations", "acceptance rate"):
        justify: Any = "left" if name in ("revision", "model", "role") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for each in rollout.revisions:
        table.add_row(
            each.revision,
            each.model,
            each.role.replace("_", " "),
            str(each.num_replicas),
            str(each.num_generations or ""),
            "" if each.acceptance_rate is None else f"{each.acceptance_rate:.3f}",
        )
    console = Console()
    console.print(table if rollout.revisions else "no draft revisions")
    if rollout.decision:
        console.print(f"last change: {rollout.decision}", highlight=False)


@drafts.command()
@takes(OperatorOptions)
def promote(options: OperatorOptions) -> None:
    """Make a revision the current one at once. Nothing is compared."""
    _change(options, lambda rollout: rollout.promote(options.revision))


@drafts.command("roll-back")
@takes(OperatorOptions)
def roll_back(options: OperatorOptions) -> None:
    """Roll back the canary, or the current revision while the former one is its control."""
    _change(options, lambda rollout: rollout.roll_back(options.revision))


@drafts.command()
@takes(OperatorOptions)
def retry(options: OperatorOptions) -> None:
    """Let a revision that was rolled back or superseded become the canary again."""
    _change(options, lambda rollout: rollout.retry(options.revision))


def _change(options: OperatorOptions, change: Callable[[Rollout], Rollout]) -> None:
    from outrider.cli.running import run

    typer.echo(run(_changed(options, change)).decision)


async def _changed(options: OperatorOptions, change: Callable[[Rollout], Rollout]) -> Rollout:
    from outrider.redis.rollout_store import RolloutStore

    redis = _redis(options.redis_url)
    store = RolloutStore(redis, options.target or await _only_target(redis))
    try:
        return await _replaced(store, options.revision, change)
    finally:
        await store.close()


async def _replaced(
    store: RolloutStore, revision: str, change: Callable[[Rollout], Rollout]
) -> Rollout:
    """Repeats the change if an orchestrator has changed the rollout meanwhile."""
    for _ in range(_MAX_ATTEMPTS):
        stored = await store.sync(0, {})
        if stored is None:
            raise Unavailable("Redis cannot be reached")
        if stored.rollout is None:
            raise ConfigError("target: it has no rollout of draft revisions that can be read")
        if revision not in stored.rollout.revisions:
            known = ", ".join(stored.rollout.revisions)
            raise ConfigError(f"revision: {revision} has no role yet; those with one are {known}")
        changed = change(stored.rollout)
        if await store.replace(stored.version, changed):
            return changed
    raise Unavailable("the rollout could not be changed: orchestrators changed it meanwhile")


async def _only_target(redis: RedisAddress) -> str:
    from outrider.redis.rollout_store import stored_targets

    targets = await stored_targets(redis)
    if targets is None:
        raise Unavailable("Redis cannot be reached")
    if len(targets) != 1:
        found = ", ".join(targets) or "none"
        raise ConfigError(f"target: name one; targets with draft revisions: {found}")
    return targets[0]


def _redis(url: str | None) -> RedisAddress:
    from outrider.settings.loader import load
    from outrider.settings.services import OrchestratorConfig

    config = load(OrchestratorConfig, "orchestrator", [] if url is None else ["--redis-url", url])
    return config.redis
