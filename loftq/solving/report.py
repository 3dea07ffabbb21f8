"""The report of a run: the rows and totals that the table, the card and `loftq.json` all show."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from loftq.artifacts.rows import planned_row, totals_of
from loftq.calibration.sizes import statistics_bytes
from loftq.core.codebooks import labels
from loftq.display import key_values, size
from loftq.planning.plan import Plan


@dataclass(frozen=True)
class Report:
    """The result of `loftq.quantize`.

    After a dry run the layers have no errors, `seconds` is None, and `parts` estimates the memory in bytes that each
    part of the run needs; `memory` is the largest of them. `statistics` is the least that the statistics of a
    calibration take on the disk, in bytes, after a dry run. `cluster` has the nodes of a cluster and the seconds that
    each part is expected to take there. `pushed` is the report of `loftq.push`, if the folder was pushed.
    """

    folder: Path
    model: str
    task: str
    recipe: Mapping[str, Any]
    totals: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    memory: int
    seconds: float | None = None
    parts: Mapping[str, int] | None = None
    statistics: int | None = None
    cluster: Mapping[str, Any] | None = None
    pushed: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {
            "folder": str(self.folder),
            "model": self.model,
            "task": self.task,
            "recipe": dict(self.recipe),
            "totals": dict(self.totals),
            "layers": [dict(row) for row in self.layers],
            "notes": list(self.notes),
            "memory_bytes": self.memory,
            **({} if self.parts is None else {"memory_bytes_of_parts": dict(self.parts)}),
            **({} if self.statistics is None else {"statistics_bytes": self.statistics}),
            **({} if self.cluster is None else {"cluster": dict(self.cluster)}),
            "seconds": self.seconds,
            **({} if self.pushed is None else {"pushed": dict(self.pushed)}),
        }

    @property
    def loading_line(self) -> str:
        """The line of Python that loads the result."""
        loader = "load_qalora" if self.recipe["adapter"] == "qalora" else "load_qlora"
        return f"model = loftq.{loader}({str(self.folder)!r})"

    def table(self) -> str:
        """The totals, for a person."""
        sums = self.totals
        share = sums["backbone_bytes"] / sums["source_bytes"]
        rows = [
            ("model", f"{self.model}, {self.task}"),
            ("folder", str(self.folder)),
            ("layers", f"{self._counted()}, {sums['weights'] / 1e6:,.1f} M weights"),
            ("bits per weight", f"{sums['bits_per_weight']:.3f}"),
            ("backbone", f"{size(sums['source_bytes'])} -> {size(sums['backbone_bytes'])} ({share:.0%})"),
            ("adapter", f"{size(sums['adapter_bytes'])}, rank {self.recipe['rank']}{self._expert_rank()}"),
        ]
        if self.parts is not None:
            rows += [("plan", line) for line in _kinds(self.layers)]
            parts = ", ".join(f"{size(nbytes)} while {part}" for part, nbytes in self.parts.items())
            rows.append(("memory", f"about {parts} (planned, nothing was written)"))
            rows += statistics_row(self.statistics)
            rows += _lines_of(self.cluster) if self.cluster is not None else []
        else:
            before, after = sums["plain_error"], sums["error"]
            gain = f" ({1 - after / before:.1%} less)" if before > after else ""
            rows.append(("error, rounded", f"{before:.5f} of ‖W‖"))
            if "refit_error" in sums:
                how = "refitted" if self.recipe["calibration"] is None else "rounded for outputs"
                rows.append((f"error, {how}", f"{sums['refit_error']:.5f} of ‖W‖"))
            rows.append(("error, with adapter", f"{after:.5f} of ‖W‖{gain}"))
            if "output_error" in sums:
                before, after = sums["output_plain_error"], sums["output_error"]
                rows.append(("error of outputs", f"{before:.5f} rounded, {after:.5f} with adapter"))
            if "refine_steps" in sums:
                before, after = sums["divergence_before"], sums["divergence"]
                rows.append(("divergence", f"{before:.5f} -> {after:.5f} nats a token ({sums['refine_steps']} steps)"))
            rows += [
                ("time", f"{self.seconds:.1f} s"),
                ("peak memory", size(self.memory)),
            ]
        if self.pushed is not None:
            rows.append(("pushed", f"{self.pushed['url']}, commit {self.pushed['commit']}"))
        rows += [("note", note) for note in self.notes]
        return key_values(rows)

    def _counted(self) -> str:
        """The number of linears, and that of experts if there are any."""
        experts = [row["shape"][0] for row in self.layers if len(row["shape"]) == 3]
        linears = f"{len(self.layers) - len(experts)} linears"
        return f"{linears}, {sum(experts):,} matrices of experts" if experts else linears

    def _expert_rank(self) -> str:
        rank = self.recipe.get("expert_rank")
        return f", of experts {rank}" if rank else ""


def report_of(
    plan: Plan,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    memory: int,
    seconds: float,
) -> Report:
    """The report of a run. `measured` are totals beside those of the layers."""
    sums, recipe = {**totals_of(plan, rows), **measured}, plan.recipe.to_dict()
    return Report(folder, plan.source.name, plan.task.name, recipe, sums, rows, plan.notes, memory, seconds)


def planned_report(
    plan: Plan, folder: Path, parts: Mapping[str, int], cluster: Mapping[str, Any] | None = None
) -> Report:
    """The report of a plan: the bytes of memory that the parts of a run need, and the estimate for a cluster."""
    rows, recipe = [planned_row(plan, layer) for layer in plan.layers], plan.recipe.to_dict()
    notes, memory = (*plan.notes, *_unmeasured(plan)), max(parts.values())
    return Report(
        folder,
        plan.source.name,
        plan.task.name,
        recipe,
        totals_of(plan),
        rows,
        notes,
        memory,
        parts=parts,
        statistics=planned_statistics(plan),
        cluster=cluster,
    )


def planned_statistics(plan: Plan) -> int | None:
    """The bytes that the statistics of a plan take on the disk, if not more; None if nothing is calibrated."""
    tokens = plan.recipe.calibration_tokens
    return None if tokens is None else statistics_bytes(plan, tokens)


def statistics_row(nbytes: int | None) -> list[tuple[str, str]]:
    """The row of a dry run that says what statistics take."""
    return [] if nbytes is None else [("statistics", f"at least {size(nbytes)} on the disk, which other runs can use")]


def _unmeasured(plan: Plan) -> list[str]:
    if not plan.recipe.measures_widths:
        return []
    how = f"--allocation {plan.recipe.allocation}"
    return [f"the run measures which layers get more bits ({how}): the widths shown here only have the right sum"]


def _lines_of(cluster: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nodes of the same kind, counted, the tasks that run on them at the same time, and the expected seconds."""
    kinds = Counter((node["cores"], node["gpus"], node["memory"]) for node in cluster["nodes"])
    rows = [
        ("nodes", f"{count} x {cores} cores, {gpus} GPUs, {size(memory)}")
        for (cores, gpus, memory), count in kinds.items()
    ]
    parts = ", ".join(f"{seconds:,.0f} s {part}" for part, seconds in cluster["seconds_of_parts"].items())
    rows += [
        ("tasks", f"{cluster['tasks']} at a time, {size(cluster['task_memory_bytes'])} each"),
        ("time", f"about {parts} (from rates measured on the nodes)"),
    ]
    return [*rows, ("refining", cluster["refining"])] if "refining" in cluster else rows


def _kinds(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Layers of the same name, shape and type, counted, and the mean of their bits."""
    names = labels(row["codebook"] for row in layers)
    kinds: dict[tuple[str, tuple[int, ...], str], list[float]] = {}
    for row in layers:
        kind = row["name"].rpartition(".")[2], tuple(row["shape"]), names[row["codebook"]]
        kinds.setdefault(kind, []).append(row["bits_per_weight"])
    return [
        f"{len(bits)} x {name} ({' x '.join(map(str, shape))}), {kind}, {fmean(bits):.3f} bits"
        for (name, shape, kind), bits in kinds.items()
    ]


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the device where it counts them, of this process otherwise."""
    if device.type != "cpu":
        counter = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        if counter is not None:
            return int(counter(device))
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count what the parent held when it started this process
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
