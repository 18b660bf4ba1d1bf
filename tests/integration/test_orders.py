"""What operators want rests in a queue at the broker: the newest message holds, whoever looks at it meanwhile."""

import pytest

from tests.rabbit import Rabbit
from tests.waiting import wait_until
from worker.core.fleet.messages import Limit, OperatorOrders
from worker.core.topology import Names, QueueType
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.fleet_tool import fleet_tool


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_an_order_while_somebody_looks(amqp_url: str, prefix: str, kind: QueueType) -> None:
    """An order that is given while somebody has the one before in hand is not lost, and replaces it."""
    old, new = OperatorOrders(1, {}, Limit(10.0, "ana@desk")), OperatorOrders(2, {}, Limit(20.0, "budi@desk"))
    names = Names(prefix)
    settings = AmqpSettings(url=Secret(amqp_url), prefix=prefix, queue_type=kind)
    with fleet_tool(settings) as tool, Rabbit(amqp_url) as rabbit, Rabbit(amqp_url) as other:
        assert tool.orders() == OperatorOrders()
        tool.order(old, {})
        in_hand = other.plain_channel()
        assert in_hand.basic_get(names.orders)[0]
        tool.order(new, {})
        assert tool.orders() == new
        in_hand.close()
        assert [tool.orders() for _ in range(3)] == [new] * 3
        wait_until(lambda: rabbit.depth(names.orders) == 1, 10, "only the new one is left")


def test_what_is_no_order_is_replaced(amqp_url: str, prefix: str) -> None:
    """A message of somebody else says nothing, and goes when an order comes."""
    with fleet_tool(AmqpSettings(url=Secret(amqp_url), prefix=prefix)) as tool, Rabbit(amqp_url) as rabbit:
        rabbit.publish("", Names(prefix).orders, b"no order")
        assert tool.orders() == OperatorOrders()
        tool.order(OperatorOrders(1, {}, Limit(10.0)), {})
        assert tool.orders() == OperatorOrders(1, {}, Limit(10.0))
        wait_until(lambda: rabbit.depth(Names(prefix).orders) == 1, 10, "only the order is left")
