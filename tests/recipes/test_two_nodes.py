"""Two nodes: two network namespaces, each with an address of its own, one rank in each, joined by a cable.

Needs root and iproute2; elsewhere it says so and is skipped.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "mutual.py"
SHAPE = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 32, "max_length": 64}
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that reach one another, and nothing else, through an interface called `cable`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the `ip` command")
    names = [f"creche-{os.getpid()}-{i}" for i in range(2)]
    cable = ["link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(*cable)
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces on this machine: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def config(folder: Path, name: str) -> Path:
    settings = {
        "students": [{"name": "one", **SHAPE}, {"name": "two", **SHAPE, "hidden": 24, "seed": 1}],
        "run": {"name": name, "folder": str(folder / "runs")},
        "data": {"folder": str(folder / "prepared"), "words": 3000, "tokenizer": {"vocab_size": 400}},
        "optimizer": {"warmup": 1},
        "train": {"steps": 6, "batch": 4, "length": 32},
        "evaluation": {"every": 6, "tokens": 100, "samples": 1, "sample_tokens": 4},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def losses(folder: Path, name: str) -> list[list[float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    return [[student["loss"] for student in record["students"].values()] for record in steps]


@pytest.mark.slow
def test_two_nodes_learn_what_one_does(nodes: list[str], tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--master_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def finish(*processes: subprocess.Popen[str]) -> None:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output[-4000:]

    def begin(command: list[str], **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command,
            env=environment | more,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole = config(tmp_path, "one-node")
    finish(begin([*launcher, "--num_accelerators", "2", str(RECIPE), "--config", str(whole)]))

    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    parted = config(tmp_path, "two-nodes")
    cluster = ["--hostfile", str(hosts), "--no_ssh", "--master_addr", ADDRESSES[0]]
    recipe = [str(RECIPE), "--config", str(parted)]
    running = []
    for rank, node in enumerate(nodes):
        here = ["ip", "netns", "exec", node, *launcher, *cluster, "--node_rank", str(rank)]
        running.append(begin([*here, *recipe], GLOO_SOCKET_IFNAME="cable"))
    finish(*running)
    expected = losses(tmp_path, "one-node")
    assert len(expected) == 6
    assert losses(tmp_path, "two-nodes") == expected
