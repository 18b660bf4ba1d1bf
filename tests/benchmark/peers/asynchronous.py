"""A hand-tuned asynchronous worker: aiormq and aiohttp on uvloop, below the comfort of aio-pika.

Bounded concurrency, pipelined confirms (each command waits for its own, nobody waits for another's), and acks sent in
batches: all commands up to a delivery tag at once, as soon as all of them have their confirm.
"""

import asyncio
import signal
import time
from typing import Any

import aiohttp
import aiormq
import uvloop
from pamqp.commands import Basic
from yarl import URL

from tests.benchmark.peers import job

EXPIRE_URL = URL(job.EXPIRE_URL)
TOKEN_URL = URL(job.TOKEN_URL)


class Gateway:
    """One session and one token for all commands."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._token = job.Token()
        self._renewing = asyncio.Lock()

    async def expire(self, asked: job.Command) -> job.Outcome:
        """Call until there is a final answer or no attempt left."""
        answer = job.Answer("again", "")
        attempt, ext_id = 0, ""
        while attempt < job.ATTEMPTS:
            attempt += 1
            used, ext_id = await self._current_token(), job.external_id()
            try:
                reply = await self._post(EXPIRE_URL, asked.body, job.headers(used, asked.body, ext_id))
            except (aiohttp.ClientError, TimeoutError):
                answer = job.Answer("again", "")
            else:
                answer = job.judge(*reply)
            if answer.verdict in ("done", "refused"):
                break
            if answer.verdict == "token":
                self._token.drop(used)
            else:
                await asyncio.sleep(job.BACKOFF * 2**attempt)
        return job.outcome(asked, answer, attempt, ext_id)

    async def _current_token(self) -> str:
        if (value := self._token.get()) is not None:
            return value
        async with self._renewing:
            if (value := self._token.get()) is not None:
                return value
            asked = time.monotonic()
            _, content = await self._post(TOKEN_URL, job.TOKEN_BODY, job.token_headers())
            return self._token.renew(asked, content)

    async def _post(self, url: Any, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        async with self._session.post(url, data=body, headers=headers) as answer:
            return answer.status, await answer.read()


class Acks:
    """Acks of one channel, in order: a delivery tag is acked when it and all before it are done."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._done: set[int] = set()
        self._next = 1
        self._flush: asyncio.Task[None] | None = None

    def done(self, tag: int) -> None:
        """Its outcome is confirmed."""
        self._done.add(tag)
        if tag == self._next and (self._flush is None or self._flush.done()):
            self._flush = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        # A task starts with the next tick of the loop: what was confirmed in this one goes out in the same ack.
        while self._next in self._done:
            while self._next in self._done:
                self._done.discard(self._next)
                self._next += 1
            await self._channel.basic_ack(self._next - 1, multiple=True, wait=False)


async def main() -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    connection = await aiormq.connect(job.AMQP_URL)
    channel = await connection.channel(publisher_confirms=True)
    await channel.basic_qos(prefetch_count=max(32, 2 * job.CONCURRENCY))
    # What a hand tunes: no cookies, no headers nobody asked for, a timeout without a timer for each request's total.
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=job.CONCURRENCY),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=job.TIMEOUT),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        auto_decompress=False,
    )
    gateway, acks, slots = Gateway(session), Acks(channel), asyncio.Semaphore(job.CONCURRENCY)

    async def on_message(message: Any) -> None:
        asked = job.command(message.header.properties.message_id, message.body)
        async with slots:
            result = await gateway.expire(asked)
        # Returns when the broker has it, and raises when it was refused or could not be routed.
        await channel.basic_publish(
            result.body,
            exchange=job.OUTCOMES,
            routing_key=result.key,
            properties=job.properties(Basic.Properties, asked, result),
            wait=False,
            mandatory=True,
        )
        acks.done(message.delivery.delivery_tag)

    await channel.basic_consume(job.COMMANDS, on_message)
    await stop.wait()
    await connection.close()
    await session.close()


if __name__ == "__main__":
    uvloop.run(main())
