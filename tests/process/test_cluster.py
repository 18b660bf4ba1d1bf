"""A cluster of three nodes with quorum queues: nodes go and come under load, and nothing is lost."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from tests.brokers import PrivateBroker, PrivateCluster
from tests.load import Scene, confirm_seconds, under_load
from tests.rabbit import delete_topology, new_prefix
from tests.worker_process import Producer, WorkerProcess
from worker.core.fleet.messages import Limit, OperatorOrders
from worker.core.lanes import CANCELLATION
from worker.core.topology import Names
from worker.sandbox.simulator import Script, Simulator
from worker.settings import AmqpSettings, Secret
from worker.shells.amqp.fleet_tool import fleet_tool

pytestmark = pytest.mark.timeout(280)

POLICY = Path(__file__).parents[2] / "k8s" / "broker" / "policy.yaml"

LONGEST_PAUSE = 30.0
"""Seconds without a call that one node may cost; one is usual, a busy machine takes more."""


def node_of(cluster: PrivateCluster, queue: str) -> PrivateBroker:
    """The node on which this queue's leader is."""
    lines = cluster.nodes[0].ctl("list_queues", "name", "leader").splitlines()
    # Before 4.0 a classic queue has none.
    found = dict(line.split() for line in lines if len(line.split()) == 2)
    return next(node for node in cluster.nodes if node.node == found[queue])


def home_of(cluster: PrivateCluster, queue: str) -> PrivateBroker:
    """The node that has the only copy of this classic queue."""
    lines = cluster.nodes[0].ctl("list_queues", "name", "pid").splitlines()
    (at,) = (found[1] for line in lines if (found := re.match(rf"{re.escape(queue)}\s+<([^.]+)\.", line)))
    return next(node for node in cluster.nodes if node.node == at)


def others(cluster: PrivateCluster, node: PrivateBroker) -> list[PrivateBroker]:
    return [other for other in cluster.nodes if other is not node]


def told(scene: Scene, what: str) -> float:
    """Prints and returns the longest pause."""
    pause = scene.longest_silence()
    print(f"{what}: calls paused for {pause:.1f} s at most, not ready {scene.lookout.flaps()} times")
    return pause


def test_the_leader_killed(cluster: PrivateCluster, tmp_path: Path) -> None:
    """kill -9 of the node that leads the lane's queue: the others go on within seconds, and nothing is lost."""

    with under_load(cluster.urls[0], tmp_path, urls=cluster.urls) as scene:
        victim = node_of(cluster, scene.names.queue(CANCELLATION))
        scene.urls = [node.url for node in others(cluster, victim)]
        scene.begin()
        victim.kill()
        scene.more_calls(timeout=60)
        scene.wait_ready()
        assert told(scene, "leader killed") < LONGEST_PAUSE
        victim.start()
        scene.more_calls(timeout=60)
        scene.settle()


def test_what_a_dead_node_held(cluster: PrivateCluster, tmp_path: Path) -> None:
    """kill -9 of the node that the worker consumes from: with the policy of the manifests (RabbitMQ 4.3), what it held
    comes again within seconds, and not after a minute."""

    prefix, node = new_prefix(), cluster.nodes[0]
    with (
        Simulator(Script(latency=1.0)) as gateway,
        WorkerProcess(",".join(cluster.urls[1:]), prefix, gateway, tmp_path, WORKER_CONCURRENCY="4") as worker,
    ):
        worker.wait_ready()
        if node.ctl("version").startswith("4.3"):
            definition = json.dumps(yaml.safe_load(POLICY.read_text())["spec"]["definition"])
            node.ctl("set_policy", prefix, f"^{prefix}[.]", definition, "--apply-to", "quorum_queues")
        with Producer(cluster.urls[0], prefix) as producer:
            producer.publish_many((f"b-{number}" for number in range(30)), sweep_every=0)
            worker.wait_for(lambda: worker.metrics()("in_flight") == 4, 30, "it works")
            lines = node.ctl("list_consumers", "channel_pid", "queue_name").splitlines()
            lane = producer.names.queue(CANCELLATION)
            (at,) = [found for line in lines if lane in line for found in re.findall(r"<([^.]+)\.", line)]
            victim = next(each for each in cluster.nodes if each.node == at)
            gateway.replace(Script())
            killed = time.monotonic()
            victim.kill()
            producer.collect_all(55)
            took = time.monotonic() - killed
            victim.start()
            worker.stop()
            print(f"RabbitMQ {node.ctl('version').strip()}: all 30 commands {took:.1f} s after the death of their node")
    delete_topology(cluster.urls[0], prefix)
    assert took < 30, "60 s is what RabbitMQ 4.3 takes without the policy"


def test_each_node_restarted_in_turn(cluster: PrivateCluster, tmp_path: Path) -> None:
    """A rolling restart of all three nodes: nothing is lost, and the worker never ends."""

    with under_load(cluster.urls[0], tmp_path, urls=cluster.urls) as scene:
        for node in cluster.nodes:
            scene.begin()
            node.stop()
            scene.more_calls(timeout=60)
            scene.wait_ready()
            assert told(scene, f"{node.node} restarted") < LONGEST_PAUSE
            cluster.start()
        scene.more_calls(timeout=60)
        scene.settle()


def test_a_lost_quorum(cluster: PrivateCluster, tmp_path: Path) -> None:
    """Two of three nodes killed: no confirm comes, calls stop; with the nodes back, all goes on and nothing is lost."""

    with under_load(
        cluster.urls[0],
        tmp_path,
        script=Script(latency=0.5),
        per_second=5,
        urls=cluster.urls,
        worker_url=lambda _: cluster.urls[0],
        PYTHONPATH=confirm_seconds(tmp_path, 5),
    ) as scene:
        scene.begin()
        scene.wait_metric(lambda metrics: metrics("in_flight") >= 2)
        for node in cluster.nodes[1:]:
            node.kill()
        scene.wait_said("broker.reconnect", "no confirm for 5 s")
        scene.wait_unready("publisher", "no confirm for 5 s")
        scene.wait_metric(lambda metrics: metrics("in_flight") == 0)
        calls = scene.calls()
        for node in cluster.nodes[1:]:
            node.launch()
        for node in cluster.nodes[1:]:
            node.wait_ready()
        lost = len(scene.lines("broker.reconnect"))
        print(f"quorum lost: {scene.calls() - calls} calls meanwhile, {lost} connections given up")
        for load in scene.loads.values():
            load.hang_up()
        scene.more_calls(timeout=90)
        scene.wait_ready(60)
        told(scene, "quorum lost, with the start of two nodes")
        scene.settle(timeout=90)


def test_a_worker_starts_while_a_node_is_down(cluster: PrivateCluster, tmp_path: Path) -> None:
    """Of each node in turn: killed, it holds nothing back. Work goes on, a worker that starts meanwhile works, too,
    whether it declares the topology or only looks, and what an operator wants is known to it."""

    with under_load(cluster.urls[0], tmp_path, urls=cluster.urls) as scene:
        with fleet_tool(AmqpSettings(url=Secret(cluster.urls[0]), prefix=scene.names.prefix)) as tool:
            tool.order(OperatorOrders(1, {}, Limit(90.0, "ana@desk")), {})
        for number, victim in enumerate(cluster.nodes):
            left = [node.url for node in others(cluster, victim)]
            directory = tmp_path / f"second-{number}"
            directory.mkdir()
            scene.urls = left
            scene.begin()
            victim.kill()
            scene.more_calls(timeout=60)
            scene.wait_ready(60)
            told(scene, f"{victim.node} killed")
            declare = str(number == 0).lower()
            with WorkerProcess(
                ",".join(left), scene.names.prefix, scene.gateway, directory, AMQP_DECLARE=declare
            ) as second:
                second.wait_ready(60)
                second.wait_for(lambda: second.metrics()("rate_limit") == 90, 30, "it knows the limit")
                second.stop()
            cluster.start()
        scene.more_calls(timeout=60)
        scene.settle()


def test_the_home_of_classic_lanes_is_down(cluster: PrivateCluster, tmp_path: Path) -> None:
    """A classic queue has one copy. While its node is down the worker waits, and says which node is to be started
    (since 4.0 the broker does not say it); once it is back, every command has its outcome."""

    prefix = new_prefix()
    url = cluster.urls[0]
    with (
        Simulator(Script(latency=0.2)) as gateway,
        WorkerProcess(",".join(cluster.urls), prefix, gateway, tmp_path, AMQP_QUEUE_TYPE="classic") as worker,
    ):
        worker.wait_ready()
        victim = home_of(cluster, Names(prefix).queue(CANCELLATION))
        url = others(cluster, victim)[0].url
        with Producer(url, prefix) as producer:
            producer.publish_many((f"b-{number}" for number in range(100)), sweep_every=0)
            producer.collect(10, 30)
            victim.kill()
            worker.wait_for(lambda: worker.get("/readyz")[0] == 503, 60, "it is not ready")
            if others(cluster, victim)[0].ctl("version").startswith("3."):
                said = f"home node '{victim.node}' of durable queue"
                worker.wait_for(lambda: said in json.dumps(worker.events()), 60, "it says which node is down")
                assert "start that node again: a classic queue has no other copy" in json.dumps(worker.events())
            victim.start()
            worker.wait_ready(120)
            producer.collect_all(60)
            worker.stop()
    delete_topology(url, prefix)
