"""One Redis connection: sends commands in a pipeline and reads the replies within a deadline.

The only module that imports `redis`; it uses that library's URLs, TLS, login and parser. Maps every
connection failure to `Unavailable`. A connection may be used by one task at a time.

redis.asyncio.Redis is not used: its pool gives each task a connection of its own. Its pipelines
cost a task switch, a deadline and a retry wrapper per command.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, cast

from redis import exceptions
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from outrider.errors import (
    ConfigError,
    InternalError,
    OutriderError,
    Unavailable,
    UnreadableRecord,
)
from outrider.security.files import read_secret
from outrider.security.pem import der_expires_at
from outrider.settings.redis_address import RedisAddress

Command = tuple[bytes, ...]
Reply = Any
"""bytes, int, None or a list of these."""

# Errors that make a connection unusable. Errors of a single command are replies instead.
_LOST = (exceptions.RedisError, OSError, EOFError)
# Matches a script error that reports the server's state. redis-py drops "ERR"; Redis 6 puts the
# state behind it. Any other script error is a defect of the script.
_STATE = re.compile(r"^[A-Z]+ |: -[A-Z]+ |permission")


# A timeout is counted in this number of timer ticks.
_TICKS = 4


@contextlib.asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """Like asyncio.timeout, but does not count the time in which this process was stalled.

    A stall counts as one tick, however long it was. Replies that arrived meanwhile are read before
    the next tick.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle
    async with asyncio.timeout(None) as scope:

        def tick(num_left: int) -> None:
            nonlocal timer
            if num_left:
                timer = loop.call_later(seconds / _TICKS, tick, num_left - 1)
            else:
                scope.reschedule(loop.time())

        timer = loop.call_later(seconds / _TICKS, tick, _TICKS - 1)
        try:
            yield
        finally:
            timer.cancel()


class _RawConnection(Protocol):
    """The used part of redis-py's connection classes, which have no type annotations."""

    @property
    def is_connected(self) -> bool: ...
    async def connect(self) -> None: ...
    async def disconnect(self, nowait: bool = False) -> None: ...
    async def send_packed_command(self, command: list[bytes], check_health: bool) -> None: ...
    async def read_response(self) -> Reply: ...


class NoScript(Exception):
    """Redis does not have the script of an EVALSHA."""


class RedisConnection:
    def __init__(
        self, redis: RedisAddress | str, *, timeout_s: float, preamble: Sequence[Command]
    ) -> None:
        """Does not connect yet. `preamble` is sent on each new connection. Raises ConfigError."""
        self._timeout_s = timeout_s
        self._preamble = tuple(preamble)
        self._address = RedisAddress(redis) if isinstance(redis, str) else redis
        self._connection = _connection(self._address)
        # Expiry (Unix time) of Redis' certificate at the last connection. None without TLS.
        self.certificate_expires_at: float | None = None
        if self._address.password_file is not None:
            read_secret(self._address.password_file, "redis_password_file")
        _tls_context(self._address)

    async def exchange(self, commands: Sequence[Command]) -> list[Reply | Exception]:
        """Returns one reply per command: a value, an OutriderError or NoScript.

        Commands must be idempotent: if the connection turns out to be closed, it is replaced once
        and all commands are sent again. Raises Unavailable within about 2 x timeout_s.
        """
        reused = self._connection.is_connected
        try:
            return await self._attempt(commands)
        except TimeoutError:
            raise self._unavailable(f"no reply within {self._timeout_s:g} s") from None
        except _LOST as error:
            await self._drop()
            if not reused:
                raise self._unavailable(error) from None
        return await self.exchange(commands)

    async def close(self) -> None:
        """Closes the connection. Idempotent; a later `exchange` connects again."""
        try:
            async with _deadline(self._timeout_s):
                await self._connection.disconnect()
        except (TimeoutError, *_LOST):
            await self._drop()

    async def _attempt(self, commands: Sequence[Command]) -> list[Reply | Exception]:
        try:
            if not self._connection.is_connected:
                async with _deadline(self._timeout_s):
                    await self._renew_tls()
                    await self._connection.connect()
                    self.certificate_expires_at = _expires_at(self._connection)
                    for reply in await self._pipeline(self._preamble):
                        if isinstance(reply, Exception):
                            raise self._unavailable(reply)
            async with _deadline(self._timeout_s):
                replies = await self._pipeline(commands)
        except BaseException:
            # Late replies must never be matched to other commands.
            await self._drop()
            raise
        if any(isinstance(reply, Unavailable) for reply in replies):
            await self._drop()  # after a failover the address may lead to another server
        return replies

    async def _renew_tls(self) -> None:
        """Reads the certificate files again; redis-py would read them only once."""
        try:
            context = await asyncio.to_thread(_tls_context, self._address)
        except ConfigError as error:
            raise self._unavailable(error) from None
        if context is not None:
            cast(Any, self._connection).ssl_context.context = context

    async def _pipeline(self, commands: Sequence[Command]) -> list[Reply | Exception]:
        connection = self._connection
        try:
            await connection.send_packed_command([_pack(commands)], check_health=False)
        except RuntimeError as error:  # uvloop raises this for a broken connection
            raise ConnectionError(str(error)) from error
        replies: list[Reply | Exception] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except exceptions.ResponseError as error:
                replies.append(_translate(error))
        return replies

    def _unavailable(self, cause: object) -> Unavailable:
        return Unavailable("Redis cannot be reached", f"redis at {self._address}: {cause}")

    async def _drop(self) -> None:
        await self._connection.disconnect(nowait=True)


def _expires_at(connection: _RawConnection) -> float | None:
    """None without TLS, or if the certificate cannot be parsed (used for monitoring only)."""
    writer: asyncio.StreamWriter | None = getattr(connection, "_writer", None)
    tls = writer.get_extra_info("ssl_object") if writer is not None else None
    with contextlib.suppress(ValueError, LookupError):
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        return der_expires_at(der) if der else None
    return None


def _pack(commands: Sequence[Command]) -> bytes:
    """Encodes commands as RESP. A round's record takes 2.4 us; redis-py's encoder takes 6.1."""
    parts = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            parts.append(b"$%d\r\n%b\r\n" % (len(argument), argument))
    return b"".join(parts)


def _translate(error: exceptions.ResponseError) -> NoScript | OutriderError:
    text = str(error)
    if isinstance(error, exceptions.NoScriptError):
        return NoScript(text)
    if "WRONGTYPE" in text:
        return UnreadableRecord("its key in Redis has another type")
    is_own = type(error) is exceptions.ResponseError and "user_script" in text
    if is_own and not _STATE.search(text):
        return InternalError("a Redis script failed", text)
    return Unavailable("Redis cannot execute commands now", text)


class _PasswordFile(CredentialProvider):
    """Reads the password file for each new connection."""

    def __init__(self, user: str | None, path: str) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = read_secret(self._path, "redis_password_file")
        except ConfigError as error:
            raise exceptions.AuthenticationError(str(error)) from None
        return (password,) if self._user is None else (self._user, password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return await asyncio.to_thread(self.get_credentials)


def _tls_context(redis: RedisAddress) -> ssl.SSLContext | None:
    """None: redis-py builds the context from the URL. Raises ConfigError."""
    if redis.ca is None and redis.cert is None:
        return None
    try:
        # Trusts the given CA only; redis-py would add the system's CAs.
        context = ssl.create_default_context(cafile=redis.ca)
        if redis.cert is not None:
            context.load_cert_chain(redis.cert, redis.key, password=lambda: b"-")
    except (OSError, ValueError) as error:
        names = f"{redis.ca or 'unset'}, {redis.cert or 'unset'}, {redis.key or 'unset'}"
        raise ConfigError(f"redis_ca, redis_cert, redis_key: {names}: {error}") from None
    return context


def _connection(redis: RedisAddress) -> _RawConnection:
    login: dict[str, Any] = {}
    if redis.password_file is not None:
        login["credential_provider"] = _PasswordFile(redis.user, redis.password_file)
    elif redis.user is not None:
        login["username"] = redis.user  # the password is in the URL
    try:
        pool = ConnectionPool.from_url(
            redis.url,
            **login,
            protocol=2,
            # `exchange` has one deadline per pipeline. redis-py's timeouts need a timer per reply,
            # and with its default retries a frozen server takes 40 s to fail.
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
        )
        return cast(_RawConnection, cast(Any, pool).make_connection())
    except (ValueError, TypeError, exceptions.RedisError) as error:
        raise ConfigError(f"redis URL {str(redis)!r}: {error}") from None
