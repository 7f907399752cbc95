"""Times every op of vgen.kernels over its own list of cases and prints a markdown table.

    python benchmarks/kernels.py                       the large cases: PyTorch twin, and on a CUDA GPU Triton and the ratio
    python benchmarks/kernels.py --op choose_tokens --all

A time is the median of repeated calls, inputs in memory, after a warm-up (which compiles the Triton kernel).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vgen.kernels import OPS
from vgen.kernels.launch import has_triton


def main() -> None:
    """Parses the command line and prints the table, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--op", choices=tuple(OPS), action="append", help="only this op (repeatable); default: all of them"
    )
    parser.add_argument("--all", action="store_true", help="also the small cases, which exist for the tests")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to repeat one measurement (default: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton = device == "cuda" and has_triton()
    print(machine(device))
    if not triton:
        print("\nTriton needs a CUDA GPU (on Linux); without one only the PyTorch twins are timed.")
    print("\n| op | case | torch ms | triton ms | torch / triton |\n| --- | --- | ---: | ---: | ---: |")
    for name in options.op or OPS:
        module = importlib.import_module(OPS[name])
        op = getattr(module, name)
        for case in module.CASES:
            if not (case.large or options.all):
                continue
            inputs = module.make_inputs(case, device)
            twin = milliseconds(lambda: op(**inputs, impl="torch"), device, options.seconds)  # noqa: B023
            row = [name, describe(case), f"{twin:.3f}", "-", "-"]
            if triton:
                kernel = milliseconds(lambda: op(**inputs, impl="triton"), device, options.seconds)  # noqa: B023
                row[3:] = [f"{kernel:.3f}", f"{twin / kernel:.1f}x"]
            print("|", " | ".join(row), "|", flush=True)


def milliseconds(call: Callable[[], Any], device: str, seconds: float) -> float:
    """Median time of `call` from start to finish of its work, over about `seconds` (three calls at least)."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(2):
        call()
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def describe(case: Any) -> str:
    """The fields of a case that differ from their defaults, e.g. `R=2 B=16 m=8 V=4096 top_k=256`."""
    shown = {
        name: value
        for name, value in vars(case).items()
        if name != "large" and value != case.__dataclass_fields__[name].default
    }
    return " ".join(f"{name}={value}" for name, value in shown.items()).replace("torch.", "")


def machine(device: str) -> str:
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    parts = [f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads, {platform.system()}"]
    if device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    parts.append(f"torch {torch.__version__}")
    if has_triton():
        parts.append(f"triton {importlib.metadata.version('triton')}")
    return "Machine: " + "; ".join(parts)


if __name__ == "__main__":
    main()
