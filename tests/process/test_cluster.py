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
from worker.core.lanes import CANCELLATION
from worker.sandbox.simulator import Script, Simulator

pytestmark = pytest.mark.timeout(280)

POLICY = Path(__file__).parents[2] / "k8s" / "broker" / "policy.yaml"

LONGEST_PAUSE = 30.0
"""Seconds without a call that one node may cost; one is usual, a busy machine takes more."""


def node_of(cluster: PrivateCluster, queue: str) -> PrivateBroker:
    """The node on which this queue's leader is."""
    found = dict(line.split() for line in cluster.nodes[0].ctl("list_queues", "name", "leader").splitlines())
    return next(node for node in cluster.nodes if node.node == found[queue])


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
