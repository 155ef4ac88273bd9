"""Functions run by several processes of this machine, as torchrun starts them."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(count: int, function: Callable[..., Any], *args: Any, folder: Path, timeout: float = 60) -> list[Any]:
    """What the function returns in each of `count` forked processes; none of them outlives the timeout."""
    folder.mkdir(parents=True, exist_ok=True)
    port, context = free_port(), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run, args=(number, count, port, folder, function, args)) for number in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert not hung, f"{len(hung)} of {count} processes hung"
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    return [torch.load(folder / f"{number}.result", weights_only=False) for number in range(count)]


def _run(number: int, count: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    if count > 1:
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "GLOO_SOCKET_IFNAME": "lo",
        }
    # torch renews its thread pool at the first use after a fork, and fails where two threads come first at once, such
    # as those that load a model's weights
    torch.set_num_threads(torch.get_num_threads())
    status = 1
    try:
        torch.save(function(*args), folder / f"{number}.result")
        status = 0
    except BaseException:
        (folder / f"{number}.error").write_text(traceback.format_exc())
    finally:
        os._exit(status)  # neither pytest's exit handlers nor a process group that waits for the others
