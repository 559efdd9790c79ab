"""Runs functions in one child process whose Triton either interprets kernels or compiles them.

A module of its own, not the conftest: the child imports it by name, and every test folder has a module named conftest.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

RunInChild = Callable[..., Any]


def _prepare_child(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported before its mode was set")
    torch.set_num_threads(1)
    if environment.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreter

        interpreter.prepare()


def child_process(**environment: str) -> Iterator[RunInChild]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _prepare_child, (environment,)) as executor:
        yield lambda function, *arguments, **options: executor.submit(function, *arguments, **options).result()
