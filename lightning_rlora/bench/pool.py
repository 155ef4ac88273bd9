"""Runs side by side: worker processes, each bound to a device."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from statistics import median

from lightning_rlora.bench.results import Result, result_of, write_result
from lightning_rlora.bench.worker import Fit, Job, work


def run_all(
    jobs: Sequence[Job],
    devices: Sequence[str],
    threads: int,
    fit: Fit,
    report: Callable[[Job, Result], None],
    limit: TimeLimit,
) -> int:
    """Do jobs on worker processes, the first ones first.

    Args:
        jobs: What to do.
        devices: One entry for each worker: for CUDA_VISIBLE_DEVICES, or `cpu`. A device may stand there several times.
        threads: Of each worker on the CPU.
        fit: Trains; pickled to the workers.
        report: Called with each job and its result, as they come.
        limit: Begin no job that would end later than this.

    Returns:
        How many jobs were done.
    """
    waiting = list(reversed(jobs))
    workers = [_Worker(device, threads, fit) for device in devices[: len(jobs)]]
    done = 0
    try:
        while True:
            for worker in workers:
                if worker.job is None and waiting and not limit.too_late(waiting[-1]):
                    worker.begin(waiting.pop())
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            if not busy:
                return done
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                job, result, duration = worker.end()
                if result.status == "finished":
                    limit.learn(job, duration)
                done += 1
                report(job, result)
    finally:
        for worker in workers:
            worker.stop()


class TimeLimit:
    """Tells, from its making on, whether a job would end too late, by the speed of those before.

    Args:
        seconds: The limit; None for none.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._began = time.monotonic()
        self._paces: dict[str, float] = {}  # of each method: seconds of wall time for an optimizer step, with pauses

    def learn(self, job: Job, duration: float) -> None:
        """Take notice of a job's seconds."""
        self._paces[job.run.method] = max(self._paces.get(job.run.method, 0.0), duration / job.run.steps)

    def too_late(self, job: Job) -> bool:
        """Whether a job that began now would end later than the limit."""
        # methods differ by a factor of ten: that of none that was run yet is taken to be in the middle
        pace = self._paces.get(job.run.method, median(self._paces.values()) if self._paces else 0.0)
        return self.seconds is not None and time.monotonic() - self._began + pace * job.run.steps > self.seconds


class _Worker:
    """A process that does one job after the other; started when a job comes and there is none."""

    def __init__(self, device: str, threads: int, fit: Fit) -> None:
        self.job: Job | None = None
        self._arguments = device, threads, fit
        self._process: BaseProcess | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        self._began = time.monotonic()
        if self._process is None:
            self._start()
        try:
            self.connection.send(job)
        except OSError:  # it has died since the job before
            self.stop()
            self._start()
            self.connection.send(job)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
        self.connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, *self._arguments))
        self._process.start()
        other.close()

    def end(self) -> tuple[Job, Result, float]:
        """The job, its result (also if the process died over it) and the seconds it took."""
        assert self.job is not None and self._process is not None
        job, self.job = self.job, None
        result: Result
        try:
            result, in_order = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            note = f"the process died (exit code {self._process.exitcode}): see log.txt in the run's folder"
            result, in_order = result_of(job.run, "failed", note=note, config=job.run.config), False
            write_result(job.output, job.run, result)
        if not in_order:
            self.stop()
        return job, result, time.monotonic() - self._began

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
            self.connection.close()
