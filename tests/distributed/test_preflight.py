"""Nodes that do not fit together are named before anything is loaded or written."""

import dataclasses
import json
import os
import shutil
import socket
import time

import pytest
import torch

from irtune.distributed import network, node_facts, runtime
from irtune.distributed import node_checks as nodes
from irtune.distributed.node_facts import NodeFacts
from irtune.errors import DistributedError, NodesError
from tests.support.ranks import free_port, run_ranks
from tests.support.runs import train
from tests.support.tiny import save_corpus, tiny_config

A = NodeFacts(
    node="node 0 (a)", versions={"torch": "2", "irtune": "1"}, digest="x", clock=100.0, options={"optim.lr": "1"}
)
B = dataclasses.replace(A, node="node 1 (b)")


@pytest.mark.quick
def test_equal_nodes_have_nothing_to_say():
    facts = [A, A, B, B]
    assert not node_facts.unequal_versions(facts) + node_facts.unequal_options(facts) + node_facts.wrong_count(facts)
    assert node_facts.clock_difference(facts) is None


@pytest.mark.quick
def test_every_difference_is_named_with_its_nodes():
    other = dataclasses.replace(B, versions={"torch": "3"}, options={"optim.lr": "2", "run.seed": "7"}, clock=160.0)
    assert node_facts.unequal_versions([A, A, other]) == [
        "torch is 2 on node 0 (a), 3 on node 1 (b); install the same requirements on every node",
        "irtune is 1 on node 0 (a), missing on node 1 (b); install the same requirements on every node",
    ]
    first, second = node_facts.unequal_options([A, other])
    assert first.startswith("optim.lr is 1 on node 0 (a), 2 on node 1 (b)")
    assert second.startswith("run.seed is missing on node 0 (a), 7 on node 1 (b)")
    assert node_facts.clock_difference([A, other]) == (
        "the clock of node 1 (b) is 60 s ahead of that of node 0 (a); logs will not line up"
    )
    many = dataclasses.replace(B, options={f"o{number}": "1" for number in range(30)})
    assert node_facts.unequal_options([A, many])[-1] == "23 other options differ between nodes as well"


@pytest.mark.quick
def test_the_number_of_nodes():
    def said(*expected):
        return node_facts.wrong_count([dataclasses.replace(one, expected=text) for one, text in zip((A, B), expected)])

    assert said("2", "2") == said("1:2", "1:2") == said("", "") == []
    assert said("3", "3") == ["3 nodes were asked for, but there are 2: node 0 (a), node 1 (b)"]
    assert said("3:4", "3:4") and said("1", "1")
    assert said("2", "3") == [
        "the number of nodes is 2 on node 0 (a), 3 on node 1 (b); start every node with the same NNODES"
    ]


@pytest.mark.quick
def test_the_node_of_a_rank_is_what_the_launcher_says(monkeypatch):
    for name in ("GROUP_RANK", "CROSS_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert node_facts.node_number() == 0
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert node_facts.node_number() == 2
    monkeypatch.setenv("CROSS_RANK", "1")  # deepspeed
    assert node_facts.node_number() == 1
    monkeypatch.setenv("GROUP_RANK", "3")  # torchrun
    assert node_facts.node_name().startswith("node 3 (")


@pytest.mark.quick
def test_addresses_and_ports():
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.interface_towards("127.0.0.1") is None, "gloo needs no help on one machine"
    assert any("127.0.0.1" in one.addresses for one in network.interfaces())
    port = free_port()
    assert network.port_problem(port) is None
    with socket.create_server(("", port)):
        assert f"port {port} of" in str(network.port_problem(port))
    with socket.socket(socket.AF_INET6) as probe:  # another node of the job on this machine looks at the same moment
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        assert network.port_problem(port) is None


@pytest.mark.quick
def test_a_port_in_use_and_a_host_that_does_not_answer_are_named(monkeypatch):
    world = runtime.World(0, 0, 2, torch.device("cpu"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            DistributedError, match=rf"port {port} \(MASTER_PORT\) of 127\.0\.0\.1 is in use by another"
        ):
            runtime.start(world, 5)
    monkeypatch.setenv("RANK", "1")
    other = runtime.World(1, 0, 2, torch.device("cpu"))
    with pytest.raises(
        DistributedError, match=rf"rank 1 \(.*\) could not join .* within 1 s, meeting at 127.0.0.1:{port}: "
    ):
        runtime.start(other, 1)


def a_node_each(good, faster, place):
    """Two ranks as two nodes; each case is what `nodes.check` says to both. Options of rank 1 may differ."""
    rank = int(os.environ["RANK"])
    os.environ.update(GROUP_RANK=str(rank), LOCAL_WORLD_SIZE="1", IRTUNE_NNODES="2")
    world = runtime.read_world()
    runtime.start(world, 60)
    settings = {"zero_optimization": {"stage": 2}}
    said = []
    nodes.SECONDS_TO_APPEAR = 0.3

    def check(config, settings):
        try:
            nodes.check(config, settings, world)
            said.append(None)
        except NodesError as error:
            said.append(str(error))

    check(good, settings)
    check(faster if rank else good, settings)
    check(good, {"zero_optimization": {"stage": 1 + rank}})
    os.environ["IRTUNE_NNODES"] = "3"
    check(good, settings)
    os.environ["IRTUNE_NNODES"] = "2"
    mine = place / f"disk{rank}"
    mine.mkdir()
    os.chdir(mine)  # as two nodes with a disk each
    check(dataclasses.replace(good, run=dataclasses.replace(good.run, output_dir="runs/one")), settings)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(nodes, "versions", lambda: {"torch": "1.0"})
            now = time.time
            patch.setattr(time, "time", lambda: now() + 100)
        check(good, settings)
    named = list(runtime.watch().nodes)
    runtime.stop()
    return said, named, [path.name for path in mine.rglob("*")]


def test_two_nodes_that_differ(llama, corpus, tmp_path):
    configs = [tiny_config(llama, corpus, tmp_path / "run", optim__lr=rate) for rate in (0.01, 0.02)]
    (said, named, left), (other, _, left_there) = run_ranks(a_node_each, 2, *configs, tmp_path)
    assert said == other, "both must stop, with the same words"
    fine, rate, stage, count, folder, version = said
    assert fine is None
    assert "optim.lr is 0.01 on node 0 (" in rate and "0.02 on node 1 (" in rate
    assert stage.startswith("DeepSpeed file: zero_optimization.stage is 1 on node 0 (")
    assert count.startswith("3 nodes were asked for, but there are 2: node 0 (")
    assert "run.output_dir" in folder and "is not visible from node 1 (" in folder
    assert "errors in the nodes of this job" in version and "torch is 2." in version
    assert [name.split(" (")[0] for name in named] == ["node 0", "node 1"]
    assert not left + left_there, "the probe is gone, and nothing was written"


def with_a_corpus_each(configs):
    rank = int(os.environ["RANK"])
    os.environ.update(GROUP_RANK=str(rank), LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    return train(configs[rank])


def test_corpora_that_differ_stop_all_ranks_before_anything_is_written(llama, corpus, tmp_path):
    other = save_corpus(tmp_path / "other")
    lines = (other / "train.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    (other / "train.jsonl").write_text("\n".join([json.dumps(first | {"after": first["before"]}), *lines[1:]]))

    def configs(*folders):
        return [tiny_config(llama, folder, tmp_path / "run", optim__max_steps=1) for folder in folders]

    said = run_ranks(with_a_corpus_each, 2, configs(corpus, other))
    assert said[0] == said[1]
    assert said[0].startswith("NodesError: the corpus is not the same on all nodes: ") and " on node 1 (" in said[0]
    assert not (tmp_path / "run").exists()
    same = shutil.copytree(corpus, tmp_path / "same")
    assert run_ranks(with_a_corpus_each, 2, configs(corpus, same)) == [None, None], "it may lie anywhere"
