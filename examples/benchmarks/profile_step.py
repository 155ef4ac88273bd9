"""What a step does to the host: synchronisations, kernel launches, allocations, and the operations that take time."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from bench import ON_GPU, TO_MS, show, synchronise
from contestant import ADAMW, RIEMANNION, Contestant
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STEPS = 5
DEVICES = {"GPU": DeviceType.CUDA, "CPU": DeviceType.CPU} if ON_GPU else {"CPU": DeviceType.CPU}
STEP = "Optimizer.step#"
"""How the profiler's name of a call of `step` begins."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READS = ("aten::item", "aten::_local_scalar_dense")
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
)


def profile_step(shapes: Sequence[tuple[int, int]], rank: int) -> dict[str, dict[str, Any]]:
    """Profile AdamW and Riemannion on pairs of given shapes, and print what was found."""
    print(f"{len(shapes)} adapters of rank {rank}\n")
    results = {}
    for name, make in (ADAMW | RIEMANNION).items():
        contestant = Contestant(make, shapes, rank)
        for _ in range(10):
            contestant.step()
        results[name] = operations(contestant)
        if ON_GPU:
            results[name] |= allocations(contestant)
            results[name]["flagged"] = flagged_synchronisations(contestant)
    counts = [key for key, value in results["AdamW"].items() if isinstance(value, int | float)]
    show(["a step", *results], [[key, *(result[key] for result in results.values())] for key in counts])
    for name, result in results.items():
        for where in result.get("flagged", []):
            print(f"{name} synchronises: {where}")
        for device in DEVICES:
            show([f"{name}, by own time on the {device}", "ms a step", "calls a step"], result[device])
    return results


def operations(contestant: Contestant) -> dict[str, Any]:
    """Counts within `step`, each per step, and the operations that take most time on each device."""
    synchronise()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU) as prof:
        for _ in range(STEPS):
            contestant.step()
    events = prof.events()
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    inside = [(e.time_range.start, e.time_range.end) for e in on_host if e.name.startswith(STEP)]
    assert len(inside) == STEPS

    def per_step(names: tuple[str, ...]) -> float:
        starts = [e.time_range.start for e in on_host if e.name in names]
        return sum(any(a <= start <= b for a, b in inside) for start in starts) / STEPS

    def slowest(device: DeviceType) -> list[list[Any]]:
        averages = [e for e in prof.key_averages() if e.device_type == device and not e.key.startswith(STEP)]
        own = [e.self_device_time_total if device == DeviceType.CUDA else e.self_cpu_time_total for e in averages]
        rows = [[e.key[:90], t / STEPS / TO_MS, e.count / STEPS] for e, t in zip(averages, own, strict=True)]
        return sorted(rows, key=lambda row: -row[1])[:20]

    on_gpu = [e.name for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(STEP)]
    copies = [name for name in on_gpu if name.startswith(("Memcpy", "Memset"))]
    return {name: slowest(device) for name, device in DEVICES.items()} | {
        "waits of the host for the device": per_step(WAITS),
        "scalars read (item, _local_scalar_dense)": per_step(READS),
        "copies from device to host": sum("DtoH" in name for name in copies) / STEPS,
        "kernel launches": per_step(LAUNCHES),
        "CUDA graph launches": per_step(("cudaGraphLaunch",)),
        "kernels run": (len(on_gpu) - len(copies)) / STEPS,
    }


def allocations(contestant: Contestant, steps: int = 50) -> dict[str, Any]:
    """Memory before and after many steps, and the allocator's calls in between."""
    before = torch.cuda.memory_stats()
    for _ in range(steps):
        contestant.step()
    synchronise()
    after = torch.cuda.memory_stats()
    return {
        "bytes allocated before": before["allocated_bytes.all.current"],
        f"bytes allocated {steps} steps later": after["allocated_bytes.all.current"],
        "bytes reserved before": before["reserved_bytes.all.current"],
        f"bytes reserved {steps} steps later": after["reserved_bytes.all.current"],
        "allocations a step": (after["allocation.all.allocated"] - before["allocation.all.allocated"]) / steps,
        "allocator's retries": after["num_alloc_retries"] - before["num_alloc_retries"],
    }


def flagged_synchronisations(contestant: Contestant) -> list[str]:
    """Where one step waits for the device, as torch's own check sees it: an empty list is what "error" would accept."""
    contestant.new_gradients()
    synchronise()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contestant.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
