# consume.py DATABASE: keeps each outcome of a cancellation once, however often it is delivered. Start it again when it
# ends: it ends with an error when the connection is lost, and what was not acknowledged comes again.
import os
import sqlite3
import sys

import pika
from pika.exceptions import AMQPError

exchange = os.environ.get("AMQP_PREFIX", "qris.expire") + ".outcomes"
database = sqlite3.connect(sys.argv[1])
database.execute("CREATE TABLE IF NOT EXISTS outcomes (id TEXT PRIMARY KEY, outcome TEXT)")
try:
    with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as connection:
        channel = connection.channel()
        channel.queue_declare("orders.outcomes", durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind("orders.outcomes", exchange, "cancellation.*")
        channel.basic_qos(prefetch_count=100)
        for method, properties, body in channel.consume("orders.outcomes"):
            with database:  # the id and what follows from the outcome: one transaction, before the acknowledgement
                known = "INSERT INTO outcomes VALUES (?, ?) ON CONFLICT DO NOTHING"
                database.execute(known, (properties.message_id, body.decode()))
            channel.basic_ack(method.delivery_tag)
except (AMQPError, OSError) as error:
    sys.exit(f"the connection to the broker ended: {error!r}")
sys.exit("the broker cancelled the consumer: was the queue deleted?")
