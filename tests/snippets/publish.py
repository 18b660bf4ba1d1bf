# publish.py BILL MERCHANT ORDER: ends with 0 once the broker has the command. After any error, run it again.
import json
import os
import sys
import time

import pika
from pika.exceptions import AMQPError, UnroutableError

bill, merchant, order = sys.argv[1:]
exchange = os.environ.get("AMQP_PREFIX", "qris.expire") + ".commands"
body = {"billnumber": bill, "additionalInfo": {"merchantId": merchant}, "reference": order}
properties = pika.BasicProperties(
    message_id=f"cancel-{order}-{bill}", delivery_mode=2, content_type="application/json", timestamp=int(time.time())
)
try:
    with pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()  # from now on, basic_publish waits for the confirm of the broker
        channel.basic_publish(exchange, "cancellation", json.dumps(body).encode(), properties, mandatory=True)
except UnroutableError:  # mandatory: no queue is bound to the exchange
    sys.exit("not published: no queue took the command; is the topology declared?")
except (AMQPError, OSError) as error:  # among them ChannelClosedByBroker (no such exchange) and NackError
    sys.exit(f"not confirmed: {error!r}; run it again: the same command has the same message_id")
