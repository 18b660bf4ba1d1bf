"""A cluster of three nodes with quorum queues: nodes go and come under load, and nothing is lost."""

from pathlib import Path

import pytest

from tests.brokers import PrivateBroker, PrivateCluster
from tests.load import Scene, confirm_seconds, under_load
from worker.core.lanes import CANCELLATION
from worker.sandbox.simulator import Script

pytestmark = pytest.mark.timeout(280)

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
        scene.wait_said("broker.bounce", "no confirm for 5 s")
        scene.wait_unready("publisher", "no confirm for 5 s")
        scene.wait_metric(lambda metrics: metrics("in_flight") == 0)
        calls = scene.calls()
        for node in cluster.nodes[1:]:
            node.launch()
        for node in cluster.nodes[1:]:
            node.wait_ready()
        print(f"quorum lost: {scene.calls() - calls} calls meanwhile, {len(scene.lines('broker.bounce'))} bounces")
        for load in scene.loads.values():
            load.hang_up()
        scene.more_calls(timeout=90)
        scene.wait_ready(60)
        told(scene, "quorum lost, with the start of two nodes")
        scene.settle(timeout=90)
