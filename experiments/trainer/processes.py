"""Several processes that train together: how they meet, and what they have to agree on."""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments.configs.checks import flatten

HEARTBEAT_S = 30  # a process that no one heard of for so long is dead: the others end
_DAY_S = 86400


def join_processes(config: ConfigDict) -> None:
    """Connect to the other processes, if `config.distributed` says so; before anything touches a device.

    Where they did not all meet within `distributed.timeout` seconds, the process ends with a line that names
    the address.

    Raises:
      ValueError: the processes have different configs; the first field that differs is named.
    """
    d = config.distributed
    if not d.enabled:
        return
    with _ends_after(d.timeout, d.coordinator, d.processes):
        jax.distributed.initialize(
            coordinator_address=d.coordinator or None,
            num_processes=d.processes or None,
            process_id=d.process if d.process >= 0 else None,
            initialization_timeout=d.timeout + 60,  # JAX's own prints a stack trace and no address
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=_DAY_S,  # the others wait while process 0 writes its report
        )
        shared = {name: value for name, value in flatten(config).items() if name != "distributed.process"}
        check_same_everywhere(shared | {"JAX": jax.__version__})


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """End this process at once if the body fails: on its way out JAX would wait for the other processes."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        which = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, SystemExit):
            told = str(error)
        elif isinstance(error, jax.errors.JaxRuntimeError):  # most often: another process is gone
            told = f"experiments.train: {which} can't go on: {error}"
        else:
            told = traceback.format_exc()
        print(told, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def check_same_everywhere(fields: Mapping[str, Any]) -> None:
    """Raise ValueError, in all processes, naming the first field that is not the same in all of them.

    Args:
      fields: JSON by name; every process must call this.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(fields, sort_keys=True, default=list).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests, sizes = multihost_utils.process_allgather((digest, np.int32(len(text))))
    if (digests == digests[0]).all():
        return
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = multihost_utils.process_allgather(padded)
    all_fields = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    for name in sorted(set().union(*all_fields)):
        values = [of_one.get(name) for of_one in all_fields]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{name}: got {values[0]!r} in process 0 and {values[other]!r} in process {other}; "
                "expected the same in all processes"
            )


@contextlib.contextmanager
def _ends_after(seconds: int, address: str, count: int) -> Iterator[None]:
    """End this process, in words, if the body takes longer: JAX waits where Python can't interrupt it."""

    def end():
        where = address or getattr(jax._src.distributed.global_state, "coordinator_address", None) or "?"
        if _answers(where):
            found = f"got {where}, which answers, but not all {count or 'the'} processes came"
        else:
            found = f"got {where}, which does not answer"
        print(
            f"experiments.train: distributed.coordinator: {found} within {seconds} s (distributed.timeout); "
            "expected host:port of process 0, which all processes reach",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except (OSError, ValueError):
        return False
