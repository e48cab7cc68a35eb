"""A lock on a run's folder: two processes that train in one would spoil each other's checkpoints."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Hold RUN/lock for this process; the system lets go of it if the process ends in any way.

    Raises:
      ValueError: another one holds it.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"run: got {run_dir}, where another process trains; expected a folder of its own"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
