"""``--ray``: a study on a real cluster of two nodes is a local one, bit for bit, also when one of them dies in the middle."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from quantscope import cluster, plan
from quantscope.cli.main import main
from quantscope.errors import StudyMismatchError
from quantscope.monitor import Monitor
from quantscope.results import Study, StudyOptions
from quantscope.study import run_study
from tests.models import STORIES

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
DEMO_TEXT = Path(__file__).resolve().parents[2] / "quantscope" / "data" / "demo.txt"
CPUS = 4  # of each node: two tasks of two threads at a time

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StudyOptions:
    """Eight batches of the trained model, four variants."""
    monkeypatch.setattr(plan, "BATCH_TOKENS", 512)
    monkeypatch.setattr(plan, "SLICE_TOKENS", 512)
    model = shutil.copy(STORIES, tmp_path / "m.gguf")
    types = ("Q4_0", "Q5_1", "Q8_0", "Q4_1")
    return StudyOptions(models=(str(model),), types=types, text=DEMO_TEXT, n_ctx=128, n_chunks=32)


@pytest.fixture
def nodes() -> Iterator[tuple[Any, list[Any]]]:
    """A cluster on this machine: a head that computes nothing, and two nodes that do."""
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        workers = [made.add_node(num_cpus=CPUS) for _ in range(2)]
        made.wait_for_nodes()
        yield made, workers
    finally:
        ray.shutdown()
        made.shutdown()


def numbers(done: Study) -> Study:
    return dataclasses.replace(done, provenance={})


class OnBatch(Monitor):
    """Does something once, when the first batch of the text is there."""

    def __init__(self, do: Any) -> None:
        self.do, self.seen = do, 0

    def scores(self, kl_nats: Mapping[str, float]) -> None:
        self.seen += 1
        if self.seen == 1:
            self.do()


def test_the_same_numbers_when_a_node_is_killed_in_the_middle(
    options: StudyOptions, nodes: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, workers = nodes
    asked: list[list[list[int]]] = []
    groups = cluster.member_groups

    def noted(*arguments: Any) -> list[list[int]]:
        asked.append(groups(*arguments))
        return asked[-1]

    monkeypatch.setattr(cluster, "member_groups", noted)
    alone = run_study(options)
    killer = OnBatch(lambda: made.remove_node(workers[1], allow_graceful=False))
    together = run_study(dataclasses.replace(options, ray=made.address), killer)
    assert killer.seen == 8
    assert asked, "the cluster was not used"
    assert alive_at_last(made) == 2  # the head and the node that is left
    assert numbers(together) == numbers(alone)


def alive_at_last(made: Any) -> int:
    """How many nodes are left once Ray has noticed: it counts a killed one until several of its health checks have failed, which takes
    longer than the rest of a short study.
    """
    ray.init(address=made.address, log_to_driver=False)
    try:
        deadline = time.monotonic() + 120
        while (n := sum(node["Alive"] for node in ray.nodes())) > 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        return n
    finally:
        ray.shutdown()


def test_groups_of_variants_join_to_the_same_numbers(options: StudyOptions, nodes: tuple[Any, list[Any]]) -> None:
    """One batch only: the variants are spread instead."""
    short = dataclasses.replace(options, n_chunks=4)
    together = run_study(dataclasses.replace(short, ray=nodes[0].address))
    assert numbers(together) == numbers(run_study(short))


def test_other_content_on_a_worker_is_told_in_one_paragraph(
    options: StudyOptions, nodes: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantscope.stages.Job.hashes", lambda job: {options.models[0]: "0" * 64})
    with pytest.raises(StudyMismatchError, match="its content on a machine of the cluster") as caught:
        run_study(dataclasses.replace(options, ray=nodes[0].address))
    assert "Traceback" not in str(caught.value)


def test_no_cluster_at_the_address(options: StudyOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", *options.models, "--text", str(DEMO_TEXT), "--ctx", "128", "--ray", "127.0.0.1:1", "--out", str(tmp_path / "s")]
    assert main(command) == 2
    assert "UsageError: --ray 127.0.0.1:1: no Ray cluster answers there" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "s").exists()
