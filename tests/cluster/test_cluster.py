"""A run on a cluster gives the bytes of a run in one process. The cluster is the stand-in of `fake_ray`.

The oracle is `loftq.quantize` without a cluster to the same path: the SHA-256 of every file. `test_with_ray.py` runs
the same on Ray itself.

Covers: loftq/cluster/calibrating.py, loftq/cluster/jobs.py, loftq/cluster/part.py, loftq/cluster/sent.py,
loftq/cluster/spread.py, loftq/cluster/work.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_ray
import pytest
import torch
from conftest import pico_llama, save_model
from fake_ray import FakeRay, node
from folders import Files, hashes
from mixtures import save_mixture
from pico_processors import draw, save_with_processor

import loftq
from loftq.calibration import conversations, progress, windows
from loftq.cluster import calibrating, cluster, jobs, part, spread, work
from loftq.cluster.jobs import SharedFolder
from loftq.cluster.part import Part
from loftq.errors import ClusterError, OptionError, OutputError, SourceError

SETTINGS: dict[str, Any] = {"rank": 4, "iters": 1, "quiet": True}
CALIBRATED: dict[str, Any] = {"calibration_tokens": 4096, "sequence_length": 128, "refine": 0}
HERE = "the id of this node"
Quantize = Callable[..., Files]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(windows, "MIN_TOKENS", 512)
    for module in (jobs, part, work):  # without Ray
        monkeypatch.setattr(module, "address_here", lambda: "10.0.0.2")
    for module in (calibrating, part):
        monkeypatch.setattr(module, "node_here", lambda: HERE)
    yield
    jobs._opened = None
    torch.set_num_threads(threads)


def run_out(worker: Part) -> None:
    """Let the thread of a worker end, which a process would take with it."""
    while worker._thread.is_alive():
        with worker._state:
            worker._ahead.clear()
            worker._asked = True
            worker._state.notify_all()
        worker._thread.join(0.01)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"Line {number} tells of a fox, a dog and a quick jump." for number in range(200)))
    return path


@pytest.fixture
def quantize(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """Quantize to the same path, on a cluster if one is given. Returns the hashes of all files."""

    def run(ray: FakeRay | None = None, model: Path = pico, **settings: Any) -> Files:
        @contextmanager
        def connected(*_: Any) -> Iterator[FakeRay]:
            assert ray is not None
            yield ray

        monkeypatch.setattr(cluster, "connected", connected)
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            loftq.quantize(str(model), output=folder, cluster=ray and "auto", **{**SETTINGS, **settings})
        finally:
            for worker in ray.killed if ray is not None else ():
                run_out(worker)
        return hashes(folder)

    return run


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do not see the output of the driver."""
    monkeypatch.setattr(SharedFolder, "is_seen", lambda _: False)


@pytest.fixture(autouse=True)
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is a task, however small."""
    monkeypatch.setattr(spread, "LEAST_VALUES", 1)


def test_small_layers_go_together(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "LEAST_VALUES", 10_000)
    ray = FakeRay()
    assert quantize(ray) == quantize()
    assert 2 <= sum(name == "run_batch" for name, _ in ray.log) < 14


def test_tasks_are_small_near_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that workers end at the same time. But a thousand vectors are not a thousand tasks."""
    monkeypatch.setattr(spread, "LEAST_VALUES", 16_000)
    sizes = {f"layer {i}": 1000 for i in range(100)} | {f"norm {i}": 1 for i in range(1000)}
    spreading = spread._Spread(FakeRay(), run_out, SimpleNamespace(statistics=None), {}, {}, sizes, None)  # type: ignore[arg-type]
    batches = list(spreading._batches(list(sizes)))
    assert [name for batch in batches for name in batch] == list(sizes)
    assert [len(batch) for batch in batches] == [16, 16, 16, 14, 10, 8, 6, 4, 3, 2, 2, 1, 1, 1, 1000]


def test_the_same_bytes_where_workers_see_the_output(quantize: Quantize) -> None:
    ray = FakeRay(node("10.0.0.2", 1), node("10.0.0.3", 1))
    assert quantize(ray) == quantize()
    layers = [options for name, options in ray.log if name == "run_batch"]
    assert len(layers) == 14 + 7  # with the tensors that are copied
    assert {options["num_cpus"] for options in layers} == {1}
    assert min(options["memory"] for options in layers) > 0


@pytest.mark.usefixtures("unshared")
def test_the_same_bytes_through_the_object_store(quantize: Quantize) -> None:
    ray = FakeRay(node("10.0.0.2", 1), node("10.0.0.3", 1))
    assert quantize(ray) == quantize()
    assert ray.most <= 4  # results that the driver has not written yet


def test_the_same_bytes_if_workers_die(quantize: Quantize) -> None:
    ray = FakeRay(lose=lambda number: fake_ray.RayError("a worker died") if number in (3, 4, 12) else None)
    assert quantize(ray) == quantize()
    assert ray.submitted > 22


@pytest.mark.parametrize("workers", [1, 3])
def test_a_calibration_does_not_depend_on_the_number_of_workers(
    quantize: Quantize, text: Path, tmp_path: Path, workers: int
) -> None:
    """Oracle: also the moments of a calibration in one process."""
    settings = {**CALIBRATED, "calibration": str(text), "statistics": tmp_path / "statistics"}
    ray = FakeRay(node("10.0.0.2", workers * torch.get_num_threads()))
    there, statistics = quantize(ray, **settings), hashes(tmp_path / "statistics")
    assert sum(name == "actor" for name, _ in ray.log) == min(workers, 2)  # two batches of 2048 tokens
    shutil.rmtree(tmp_path / "statistics")
    assert quantize(**settings) == there
    assert hashes(tmp_path / "statistics") == statistics


def test_sums_leave_a_node_as_seldom_as_possible(
    quantize: Quantize, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a node follow one another, and those of the driver's node come last."""
    asked = iter([HERE, "there", HERE])
    nodes: dict[Part, str] = {}
    order: list[str] = []
    take = Part.take
    monkeypatch.setattr(Part, "node", lambda self: nodes.setdefault(self, next(asked)))
    monkeypatch.setattr(Part, "take", lambda self, *given: (order.append(nodes[self]), take(self, *given))[1])
    settings = {**CALIBRATED, "calibration_tokens": 6144, "calibration": str(text)}
    cores = torch.get_num_threads()  # of a worker
    ray = FakeRay(node("10.0.0.2", 2 * cores), node("10.0.0.3", cores))
    assert quantize(ray, **settings) == quantize(**settings)
    assert order == ["there", HERE, HERE]


@pytest.mark.parametrize("sent", [False, True])
def test_experts_get_the_tokens_of_all_workers(
    quantize: Quantize, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    """Oracle: also the statistics, which hold the tokens of each experts module. With `sent`, tasks bring them."""
    mixture = save_mixture("qwen3_moe", tmp_path / "mixture")
    settings = {**CALIBRATED, "calibration": str(text), "statistics": tmp_path / "statistics"}
    settings |= {"block_size": 32, "expert_rank": 2}
    ray = FakeRay(node("10.0.0.2", 2 * torch.get_num_threads()))
    if sent:
        monkeypatch.setattr(jobs, "_statistics_here", lambda *_: None)
        monkeypatch.setattr(SharedFolder, "is_seen", lambda _: False)
    there, statistics = quantize(ray, mixture, **settings), hashes(tmp_path / "statistics")
    assert any(name.startswith("tokens-") for name in statistics)
    shutil.rmtree(tmp_path / "statistics")
    assert quantize(None, mixture, **settings) == there
    assert hashes(tmp_path / "statistics") == statistics


def test_conversations_with_images_are_split_too(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MIN_TOKENS", 64)
    model = save_with_processor("llava", tmp_path / "llava")
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": image}, {"type": "text", "text": "What is it?" * 3}],
                }
            ]
        }
        for image in draw(tmp_path, 3)
    ]
    talks = tmp_path / "talks.jsonl"
    talks.write_text("\n".join(map(json.dumps, rows)))
    settings = {"calibration": str(talks), "calibration_tokens": 4096, "statistics": tmp_path / "statistics"}
    ray = FakeRay(node("10.0.0.2", 2 * torch.get_num_threads()))
    there, statistics = quantize(ray, model, **settings), hashes(tmp_path / "statistics")
    assert sum(name == "actor" for name, _ in ray.log) == 2
    shutil.rmtree(tmp_path / "statistics")
    assert quantize(None, model, **settings) == there
    assert hashes(tmp_path / "statistics") == statistics


@pytest.mark.usefixtures("unshared")
def test_moments_are_sent_to_workers_that_do_not_see_them(
    quantize: Quantize, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = quantize(calibration=str(text), **CALIBRATED)
    monkeypatch.setattr(jobs, "_statistics_here", lambda *_: None)
    assert quantize(FakeRay(), calibration=str(text), **CALIBRATED) == here


def test_a_lost_calibration_starts_again(quantize: Quantize, text: Path, tmp_path: Path) -> None:
    settings = {**CALIBRATED, "calibration": str(text), "statistics": tmp_path / "statistics"}
    here = quantize(**settings)
    shutil.rmtree(tmp_path / "statistics")
    ray = FakeRay(lose=lambda number: fake_ray.RayError("a worker died") if number == 5 else None)
    assert quantize(ray, **settings) == here


def test_an_adapter_is_refined_in_one_worker(quantize: Quantize, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only the cluster has a GPU. A worker that does not see the folder cannot refine."""
    settings = {**CALIBRATED, "calibration": str(text), "refine": 1}
    here = quantize(**settings)
    monkeypatch.setattr(cluster, "is_here", lambda _: False)
    ray = FakeRay()
    assert quantize(ray, **settings) == here
    assert sum(name == "refine_task" for name, _ in ray.log) == 1
    monkeypatch.setattr(SharedFolder, "is_seen", lambda _: False)
    with pytest.raises(OutputError, match=r"^node 10\.0\.0\.2 refines the adapter, and does not see the output folder"):
        quantize(FakeRay(), **settings)


def test_a_calibration_whose_workers_are_gone_can_be_continued(
    quantize: Quantize, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends since no node is left keeps its progress; the next one begins after the blocks that it has."""
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    settings = {**CALIBRATED, "calibration": str(text), "statistics": tmp_path / "statistics"}
    here = quantize(**settings)
    shutil.rmtree(tmp_path / "statistics")
    monkeypatch.setattr(calibrating, "_PATIENCE", -1.0)
    cores = 2 * torch.get_num_threads()
    ray, after = FakeRay(node("10.0.0.2", cores)), FakeRay(node("10.0.0.2", cores))

    def leave(_: int) -> Exception | None:
        """All nodes leave in the second block."""
        if sum(name == "step" for name, _ in ray.log) < 3:
            return None
        ray.rows = []
        return fake_ray.RayError("it is gone")

    ray.lose = leave
    with pytest.raises(ClusterError, match=r"^calibration: no node of the cluster has room .*: run again to continue$"):
        quantize(ray, **settings)
    assert quantize(after, **settings) == here
    assert sum(name == "step" for name, _ in after.log) == 2 * 2  # one block, and the end, for each of two workers


def test_losses_count_only_without_progress_in_between(
    quantize: Quantize, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    monkeypatch.setattr(calibrating, "_MOST_LOSSES", 1)
    settings = {**CALIBRATED, "calibration": str(text), "statistics": tmp_path / "statistics"}
    here = quantize(**settings)

    def calibrate(*lost: int) -> Files:
        """On two workers, losing these of their steps. The first two are those of the first block."""
        shutil.rmtree(tmp_path / "statistics", ignore_errors=True)
        ray = FakeRay(node("10.0.0.2", 2 * torch.get_num_threads()))

        def lose(_: int) -> Exception | None:
            steps = sum(name == "step" for name, _ in ray.log)
            return fake_ray.RayError("it is gone") if ray.log[-1][0] == "step" and steps in lost else None

        ray.lose = lose
        return quantize(ray, **settings)

    assert calibrate(3, 5) == here  # the first block was recorded in between
    with pytest.raises(ClusterError, match=r"^calibration: 2 workers of the cluster died"):
        calibrate(1, 3)


def test_widths_are_measured_there(quantize: Quantize) -> None:
    ray = FakeRay()
    assert quantize(ray, bits=3.25, quant_type="nf") == quantize(bits=3.25, quant_type="nf")
    assert sum(name == "run_batch" for name, _ in ray.log) == 14 + 21  # and then they are solved


def test_widths_that_sensitivities_choose(quantize: Quantize, text: Path) -> None:
    """Sensitivities are measured in this process, errors there."""
    settings = {
        **CALIBRATED,
        "calibration": str(text),
        "allocation": "sensitive",
        "bits": 2.25,
        "quant_type": "tcqfast",
    }
    assert quantize(FakeRay(), **settings) == quantize(**settings)


def test_a_weight_that_is_not_finite_ends_the_run(quantize: Quantize, tmp_path: Path) -> None:
    model = pico_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    broken = save_model(model, tmp_path / "broken")
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj.*NaN") as caught:
        quantize(FakeRay(), broken)
    assert "\n" not in str(caught.value)


def test_a_node_of_other_versions_is_named_before_work_begins(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = jobs.version_probe()
    monkeypatch.setattr(cluster, "version_probe", lambda: lambda *_: {**probe(), "torch": "1.0"})
    monkeypatch.setattr(fake_ray, "copied", lambda value: value)
    with pytest.raises(OptionError, match=r"^node 10\.0\.0\.2 has .*: install .* on all nodes$"):
        quantize(FakeRay())


def test_a_node_with_other_files_is_named_before_work_begins(
    quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "sizes_of", lambda _: {"model.safetensors": 1})
    ray = FakeRay()
    with pytest.raises(OptionError, match=r"^node 10\.0\.0\.2 has other files of .* than the node that started"):
        quantize(ray)
    assert [task for task, _ in ray.log] == ["versions", "check_task"]


def test_a_node_that_does_not_see_the_source_is_named(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise SourceError("the folder does not exist")

    monkeypatch.setattr(jobs, "find_source", missing)
    with pytest.raises(OptionError, match=r"^node 10\.0\.0\.2 cannot read the model: the folder does not exist$"):
        quantize(FakeRay())


def test_a_node_that_leaves_before_it_is_asked_does_no_harm(quantize: Quantize) -> None:
    ray = FakeRay(lose=lambda number: fake_ray.TaskUnschedulableError("it has left") if number <= 2 else None)
    assert quantize(ray) == quantize()


def test_a_cluster_that_is_too_small_is_refused(quantize: Quantize) -> None:
    with pytest.raises(OptionError, match=r"the largest layer needs 1 core and .* on one node, and no node has that"):
        quantize(FakeRay(node("10.0.0.2", 2, memory=1000)))
    with pytest.raises(OptionError, match="--device cuda: no node of the cluster has a GPU"):
        quantize(FakeRay(), device="cuda")
    with pytest.raises(OptionError, match="--device cuda:1: each task of a cluster gets a GPU of its own"):
        quantize(FakeRay(), device="cuda:1")


def test_an_error_of_the_cluster_itself_is_one_line(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()

    def gone(*_: Any) -> None:
        raise fake_ray.RayError("the head is gone\nand a long story")

    monkeypatch.setattr(ray, "put", gone)
    with pytest.raises(ClusterError, match=r"^the cluster failed \(the head is gone.*\): run again with --resume$"):
        quantize(ray)


def test_what_is_not_spread_over_a_cluster_is_refused(quantize: Quantize, pico: Path) -> None:
    with pytest.raises(OptionError, match=r"^--cluster: an adapter for a given model is worked on in one process"):
        quantize(FakeRay(), backbone=str(pico), iters=None)
    with pytest.raises(OptionError, match=r"^--device mps: expected cpu or cuda with --cluster$"):
        quantize(FakeRay(), device="mps")


def test_a_dry_run_shows_nodes_and_time(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    @contextmanager
    def connected(*_: Any) -> Iterator[FakeRay]:
        yield FakeRay(node("10.0.0.2", 2, memory=4e9), node("10.0.0.3", 2, memory=4e9))

    monkeypatch.setattr(cluster, "connected", connected)
    settings = {**SETTINGS, **CALIBRATED, "calibration": str(text)}
    report = loftq.quantize(str(pico), output=tmp_path / "out", cluster="auto", dry_run=True, **settings)
    assert report.cluster is not None
    assert report.cluster["tasks"] == 4
    assert set(report.cluster["seconds_of_parts"]) == {"calibrating", "solving"}
    assert not (tmp_path / "out").exists()
