# publish.py BILL MERCHANT ORDER: ends with 0 once the broker has the command safely.
import json
import os
import sys
import time

import pika

bill, merchant, order = sys.argv[1:]
body = {"billnumber": bill, "additionalInfo": {"merchantId": merchant}, "reference": order}
properties = pika.BasicProperties(
    message_id=f"cancel-{order}", delivery_mode=2, content_type="application/json", timestamp=int(time.time())
)
with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as connection:
    channel = connection.channel()
    channel.confirm_delivery()  # publishing waits for the broker's confirm, and raises without one
    # mandatory: where the queue is missing it raises UnroutableError. After any error: again, same message_id.
    channel.basic_publish("qris.expire.commands", "cancellation", json.dumps(body).encode(), properties, mandatory=True)
