"""What gpu.py keeps its findings with: lines as they are made, a table, profiles, stages that may fail.

It is no part of bench.py because only a run of many stages in one process needs it, and gpu.py would be too long with it.
"""

import gc
import json
import math
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import bench
import torch

PROFILED = 3  # steps of a picture


class Report:
    """What was found: each line of it is on the disk as soon as it is known."""

    def __init__(self, out: Path, budget: float, device: str, tiny: bool) -> None:
        """budget: seconds from now. tiny: targets are not judged, nothing is skipped."""
        self.out, self.budget, self.device, self.tiny = out, budget, device, tiny
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.started, self.stage = time.perf_counter(), ""
        self.rows: list[dict[str, Any]] = []
        self.kernels: list[str] = []  # tables
        self.ended: dict[str, str] = {}  # stage -> how
        out.mkdir(parents=True, exist_ok=True)
        for name in ("findings.jsonl", "profiles.txt"):
            (out / name).write_text("")

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def write(self, **row: Any) -> None:
        row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        line = json.dumps({"stage": self.stage, "at_s": round(self.elapsed(), 1)} | row)
        print(line, flush=True)
        with open(self.out / "findings.jsonl", "a") as file:
            file.write(line + "\n")

    def tell(
        self, what: str, found: float, unit: str = "", against: float | None = None, of: str = "", target=None, **more: Any
    ) -> None:
        """One finding. against: what it is compared with, called `of`, in the same unit. target: (least, most) of their ratio,
        or of `found` itself where there is nothing beside it."""
        ratio = found / against if against else None
        judged = found if ratio is None else ratio
        reached = None if target is None or self.tiny else bool(target[0] <= judged <= target[1])
        wanted = None if target is None else [edge if math.isfinite(edge) else None for edge in target]
        row = {"what": what, "found": found, "unit": unit, "against": against, "of": of, "ratio": ratio}
        row |= {"target": wanted, "reached": reached} | more
        self.rows.append(row | {"stage": self.stage})
        self.write(**row)

    def run(self, name: str, stage: Any, seconds: float) -> None:
        """Run one stage, which takes about so many seconds on an H100, unless too little of the budget is left for it."""
        self.stage = name
        if self.elapsed() + (0 if self.tiny else seconds) > self.budget:
            self.ended[name] = f"skipped: about {seconds:.0f} s, with {self.budget - self.elapsed():.0f} s left"
            self.write(skipped=self.ended[name])
        else:
            begun = time.perf_counter()
            try:
                stage(self)
                self.ended[name] = "ran"
            except Exception as error:
                self.ended[name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
                self.write(failed=self.ended[name], frames=traceback.format_tb(error.__traceback__)[-3:])
            self.write(ended=self.ended[name].partition(":")[0], seconds=time.perf_counter() - begun)
        (self.out / "table.md").write_text(self.table())
        gc.collect()
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def table(self) -> str:
        def target(row: dict[str, Any]) -> str | None:
            if row["target"] is None:
                return None
            least, most = row["target"]
            return f">= {least:g}" if most is None else f"<= {most:g}" if least == 0 else f"{least:g} to {most:g}"

        lines = [
            {
                "stage": row["stage"],
                "what": row["what"],
                "found": f"{bench.written(row['found'])} {row['unit']}".strip(),
                "against": f"{bench.written(row['against'])} {row['unit']} ({row['of']})" if row["against"] else None,
                "ratio": row["ratio"],
                "target": target(row),
                "": {None: "", True: "reached", False: "**missed**"}[row["reached"]],
            }
            for row in self.rows
        ]
        ended = [f"- {name}: {how}" for name, how in self.ended.items() if how != "ran"]
        about = f"{bench.machine(self.device)}, cuDNN {torch.backends.cudnn.version()}, {'tiny' if self.tiny else 'real'} sizes"
        parts = [about, bench.markdown(lines), *self.kernels, "Not in it:" if ended else "Every stage ran.", "\n".join(ended)]
        return "\n\n".join(part for part in parts if part) + "\n"


class Profile:
    """A profile of what runs between start and stop; as `advance` of `sample`, of PROFILED steps in a picture's middle."""

    def __init__(self, report: Report, name: str, steps: int = 0) -> None:
        self.report, self.name, self.first, self.calls = report, name, steps // 2, 0
        cuda = [torch.profiler.ProfilerActivity.CUDA] if report.device == "cuda" else []
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda])

    def start(self) -> None:
        bench.wait(self.report.device)
        self.profiler.start()

    def __call__(self, _: float) -> None:
        self.calls += 1
        if self.calls == self.first:
            self.start()
        if self.calls == self.first + PROFILED:
            self.stop(PROFILED)

    def stop(self, steps: int, most: int = 12) -> None:
        """Tell where the time of one of `steps` went: kernels of a GPU, operations of a CPU."""
        bench.wait(self.report.device)
        self.profiler.stop()
        averages = self.profiler.key_averages()
        if self.report.device == "cuda":  # kernels alone: an operation's row counts its kernels once more
            gpu = torch.autograd.DeviceType.CUDA
            own = {event.key: event for event in averages if event.device_type == gpu and not event.is_user_annotation}
            time_of = {key: event.self_device_time_total for key, event in own.items()}
        else:
            own = {event.key: event for event in averages}
            time_of = {key: event.self_cpu_time_total for key, event in own.items()}
        total, launched = sum(time_of.values()) / steps, sum(event.count for event in own.values()) / steps
        top = sorted(own, key=time_of.__getitem__, reverse=True)[:most]
        rows = [
            {"kernel": key[:90].replace("|", "/"), "launches": own[key].count / steps, "us": time_of[key] / steps}
            for key in top
        ]
        self.report.tell(f"{self.name}: kernels", launched, "launches", busy_us=total, top=rows)
        self.report.kernels.append(f"{self.name}: {total:.0f} us in {launched:.0f} launches\n\n{bench.markdown(rows)}")
        with open(self.report.out / "profiles.txt", "a") as file:
            order = "self_cuda_time_total" if self.report.device == "cuda" else "self_cpu_time_total"
            file.write(f"== {self.name}\n{averages.table(sort_by=order, row_limit=40, max_name_column_width=90)}\n")


def seconds_of(report: Report, run: Any, repeats: int = 2) -> tuple[float, float]:
    """(seconds of the first call, median seconds of the `repeats` later ones; of none, the first again)."""
    times = []
    for _ in range(1 + repeats):
        bench.wait(report.device)
        begun = time.perf_counter()
        run()
        bench.wait(report.device)
        times.append(time.perf_counter() - begun)
    return times[0], statistics.median(times[1:] or times)


def peak(report: Report) -> float | None:
    return bench.peak_gb(report.device)
