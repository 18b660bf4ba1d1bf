# consume.py DATABASE: keeps each outcome of a cancellation once, however often it is delivered. After any error it
# connects again: what was not acknowledged comes again.
import os
import sqlite3
import sys
import time

import pika
from pika.exceptions import AMQPError

exchange = os.environ.get("AMQP_PREFIX", "qris.expire") + ".outcomes"
database = sqlite3.connect(sys.argv[1])
database.execute("CREATE TABLE IF NOT EXISTS outcomes (id TEXT PRIMARY KEY, outcome TEXT)")
known = "INSERT INTO outcomes VALUES (?, ?) ON CONFLICT DO NOTHING"

while True:
    try:
        with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as connection:
            channel = connection.channel()
            channel.queue_declare("orders.outcomes", durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind("orders.outcomes", exchange, "cancellation.*")
            channel.basic_qos(prefetch_count=100)
            for method, properties, body in channel.consume("orders.outcomes"):
                with database:  # the id and what follows from the outcome: one transaction, before the acknowledgement
                    database.execute(known, (properties.message_id, body.decode()))
                channel.basic_ack(method.delivery_tag)
            print("the broker cancelled the consumer: was the queue deleted?", file=sys.stderr)
    except (AMQPError, OSError, ValueError, sqlite3.Error) as error:  # ValueError: no AMQP, or cut off while connecting
        print(f"not consuming: {error!r}", file=sys.stderr)
    time.sleep(2)
