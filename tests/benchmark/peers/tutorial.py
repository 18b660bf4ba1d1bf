"""The worker as tutorials write it: pika's BlockingConnection, one command at a time, requests.Session.

It publishes, waits for the confirm, acks, and takes the next command.
"""

import signal
import sys
import time
from typing import Any

import pika
import requests

from tests.benchmark.peers import job

session = requests.Session()
token = job.Token()


def current_token() -> str:
    """The token at hand, or a new one."""
    if (value := token.get()) is not None:
        return value
    asked = time.monotonic()
    answer = session.post(job.TOKEN_URL, data=job.TOKEN_BODY, headers=job.token_headers(), timeout=job.TIMEOUT)
    answer.raise_for_status()
    return token.renew(asked, answer.content)


def expire(asked: job.Command) -> job.Outcome:
    """Call until there is a final answer or no attempt left."""
    answer = job.Answer("again", "")
    attempt, ext_id = 0, ""
    while attempt < job.ATTEMPTS:
        attempt += 1
        used, ext_id = current_token(), job.external_id()
        try:
            reply = session.post(
                job.EXPIRE_URL, data=asked.body, headers=job.headers(used, asked.body, ext_id), timeout=job.TIMEOUT
            )
        except requests.RequestException:
            answer = job.Answer("again", "")
        else:
            answer = job.judge(reply.status_code, reply.content)
        if answer.verdict in ("done", "refused"):
            break
        if answer.verdict == "token":
            token.drop(used)
        else:
            time.sleep(job.BACKOFF * 2**attempt)
    return job.outcome(asked, answer, attempt, ext_id)


def on_message(channel: Any, method: Any, received: Any, body: bytes) -> None:
    """One command, from delivery to ack."""
    asked = job.command(received.message_id, body)
    result = expire(asked)
    made = job.properties(pika.BasicProperties, asked, result)
    # In confirm mode this returns when the broker has it, and raises when it was refused or could not be routed.
    channel.basic_publish(job.OUTCOMES, result.key, result.body, made, mandatory=True)
    channel.basic_ack(method.delivery_tag)


def main() -> None:
    """Until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    connection = pika.BlockingConnection(pika.URLParameters(job.AMQP_URL))
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=1)
    channel.basic_consume(job.COMMANDS, on_message)
    channel.start_consuming()


if __name__ == "__main__":
    main()
