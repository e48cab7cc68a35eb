"""Jobs of one or several processes on this machine: started together, watched, ended together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

GRACE_S = 3.0  # for the others to tell their errors, once one process failed
# Linux: keep to the cores that come first, and run the rest of the command line in place of this program. The
# process is killed (PR_SET_PDEATHSIG) once the launcher is gone.
_PROGRAM = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
os.execv(sys.argv[2], sys.argv[2:])"""


class Died(RuntimeError):
    """A process of a job ended with an error, or was killed."""


class Stopped(Exception):
    """The launcher was told to stop, and the job has saved its state and ended."""


def flags_of(fields: Mapping[str, Any]) -> list[str]:
    """Write fields of a config by their paths, such as "optimizer.name", as flags."""
    return [f"--config.{name}={value}" for name, value in fields.items()]


def without_run(arguments: Sequence[str]) -> list[str]:
    """Leave --run out of flags, in both of its spellings.

    Example:
        >>> without_run(["--run=a", "--x=1", "--run", "b"])
        ['--x=1']
    """
    kept, follows = [], False
    for argument in arguments:
        if not follows and argument != "--run" and not argument.startswith("--run="):
            kept.append(argument)
        follows = argument == "--run" and not follows
    return kept


def commands(arguments: Sequence[str], count: int, port: int | str = "PORT") -> list[list[str]]:
    """Command lines of the processes of one job.

    Args:
      arguments: flags of `experiments.train`.
      count: processes; one alone needs no others to meet.
      port: where process 0 listens.
    """
    alone = [sys.executable, "-m", "experiments.train", *arguments]
    if count == 1:
        return [alone]
    fields = {"enabled": True, "coordinator": f"localhost:{port}", "processes": count}
    return [
        [*alone, *flags_of({f"distributed.{k}": v for k, v in (fields | {"process": i}).items()})]
        for i in range(count)
    ]


def run_job(
    arguments: Sequence[str],
    count: int,
    *,
    restarts: int = 0,
    say: Callable[[str], Any] = print,
    started: Callable[[list[int]], Any] = lambda ids: None,
) -> None:
    """Train in `count` new processes of this machine, and return once all have ended.

    SIGTERM and Ctrl-C are handed on: the processes save, end, and `Stopped` is raised. A second one kills.

    Args:
      arguments: flags of `experiments.train`.
      count: processes.
      restarts: how often a job whose process died starts again, from its last checkpoint.
      say: takes each line that they print, with the number of its process before it.
      started: takes their process ids, each time that they start.

    Raises:
      Died: a process failed, which the message names, and the others were ended.
      Stopped: as said.
    """
    for left in range(restarts, -1, -1):
        try:
            return _run_once(arguments, count, say, started)
        except Died as error:
            if not left:
                raise
            say(f"{error}; starting again, {left - 1} restarts left")


def _run_once(arguments, count: int, say, started) -> None:
    each = zip(commands(arguments, count, _free_port()), cores_of(count), strict=True)
    processes = [start(command, cores) for command, cores in each]
    prefixes = [f"[{i}] " if count > 1 else "" for i in range(count)]
    readers = [
        threading.Thread(target=_hand_on, args=(process.stdout, prefix, say), daemon=True)
        for process, prefix in zip(processes, prefixes, strict=True)
    ]
    for reader in readers:
        reader.start()
    with _Stop(processes) as stop:
        try:
            started([process.pid for process in processes])
            failed = _wait_for_all(processes)
        finally:
            for process in processes:
                process.kill()  # does nothing to one that has ended
                process.wait()
            for reader in readers:
                reader.join(GRACE_S)
    if stop.came:
        raise Stopped
    if failed is not None:
        raise Died(_story(failed, processes[failed].returncode, count))


def _wait_for_all(processes: Sequence[subprocess.Popen]) -> int | None:
    """Wait until all have ended well, or one has not: its number. The others get a moment to say why."""
    while True:
        statuses = {i: process.poll() for i, process in enumerate(processes)}
        failed = {i: status for i, status in statuses.items() if status}
        if failed:
            end = time.monotonic() + GRACE_S
            while time.monotonic() < end and any(process.poll() is None for process in processes):
                time.sleep(0.02)
            # A killed one first: the others fail because it is gone.
            return min(failed, key=lambda i: (failed[i] > 0, i))
        if all(status == 0 for status in statuses.values()):
            return None
        time.sleep(0.02)


def _story(number: int, status: int, count: int) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    which = f"process {number} of {count}" if count > 1 else "the process"
    return f"{which} {how}{', and the others were ended' if count > 1 else ''}"


class _Stop:
    """Hands SIGTERM and SIGINT on to processes as SIGTERM, the second one as SIGKILL."""

    def __init__(self, processes: Sequence[subprocess.Popen]):
        self.came = False
        self._processes = processes

    def _hand_on(self, *_) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGKILL if self.came else signal.SIGTERM)
        self.came = True

    def __enter__(self) -> "_Stop":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._hand_on) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)


def cores_of(count: int) -> list[list[int]]:
    """Share this program's cores out, neighbours to each process; all to each where there are too few.

    Threads of a process that waits for another one would else take the time of the cores that it waits for.
    A system that can't tell its cores gives no lists of them.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * count
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return [cores] * count
    return [cores[len(cores) * i // count : len(cores) * (i + 1) // count] for i in range(count)]


def start(command: list[str], cores: Sequence[int]) -> subprocess.Popen:
    """Start a command on some cores of this machine; it ends with this program."""
    if sys.platform == "linux":
        command = [sys.executable, "-S", "-c", _PROGRAM, ",".join(map(str, cores)), *command]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a terminal's Ctrl-C comes to the launcher alone
    )


def _hand_on(lines: Any, prefix: str, say: Callable[[str], Any]) -> None:
    with lines:
        for line in lines:
            say(prefix + line.rstrip("\n"))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
