# consume.py DATABASE: outcomes of cancellations into a table, each once, however often it is delivered.
import os
import sqlite3
import sys

import pika

database = sqlite3.connect(sys.argv[1])
database.execute("CREATE TABLE IF NOT EXISTS outcomes (id TEXT PRIMARY KEY, outcome TEXT)")
with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as connection:
    channel = connection.channel()
    channel.queue_declare("orders.outcomes", durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind("orders.outcomes", "qris.expire.outcomes", "cancellation.*")
    channel.basic_qos(prefetch_count=100)
    for method, properties, body in channel.consume("orders.outcomes"):
        with database:  # the key and what follows from the outcome: in one transaction, and before the ack
            known = "INSERT INTO outcomes VALUES (?, ?) ON CONFLICT DO NOTHING"
            database.execute(known, (properties.message_id, body.decode()))
        channel.basic_ack(method.delivery_tag)
