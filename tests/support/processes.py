"""Runs functions in groups of processes that share one import of everything.

    python -m tests.support.processes MODULE FOLDER

MODULE has `scenarios(folder)`, a list of (number of processes, function). The functions run one after the other, each in a
process group of its own, in as many of the forked processes. Forking comes before torch has started a thread.
"""

import importlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

Scenario = tuple[int, Callable[[], None]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


def join(rank: int, ports: list[int], scenarios: list[Scenario]) -> None:
    """Takes part in the scenarios that have room for this process."""
    from accelerate.state import AcceleratorState
    from torch import distributed

    for port, (processes, function) in zip(ports, scenarios, strict=True):
        if rank >= processes:
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_PORT=str(port))
        function()
        AcceleratorState._reset_state(True)
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()


def main(module: str, folder: str) -> None:
    scenarios = importlib.import_module(module).scenarios(Path(folder))
    ports = [free_port() for _ in scenarios]
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    children = []
    for rank in range(max(processes for processes, _ in scenarios)):
        child = os.fork()
        if child == 0:
            try:
                join(rank, ports, scenarios)
            except BaseException:
                traceback.print_exc()
                os.killpg(0, 15)  # the others would wait for this one
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    main(*sys.argv[1:])
