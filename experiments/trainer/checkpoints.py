"""Checkpoints of a run: atomic, written while training goes on, the newest kept, checked when read back.

RUN/checkpoints/<step>/ holds params, ema (if there is one), training (optimizer state, RNG, step), data (the
iterator's place, one file a process) and about (the config, and a checksum of every array).
"""

import json
import zlib
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from experiments.trainer.state import TrainState

# What may differ between a checkpoint's config and the run that goes on from it: it changes nothing that the
# checkpoint holds. A new number of steps changes the schedule of those still to come.
MAY_CHANGE = (
    "steps",
    "run_dir",
    "parallel",
    "mesh",
    "distributed",
    "log_every",
    "checkpoint",
    "evaluation",
    "sample",
)


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or read back."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: str | Path, *, keep: int = 2, read_only: bool = False):
        """Open RUN/checkpoints, clearing what an interrupted save left there.

        Args:
          run_dir: the run's folder; made if missing.
          keep: how many checkpoints stay.
          read_only: for evaluation and generation: makes and removes nothing.
        """
        self.folder = Path(run_dir).absolute() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} does not exist: {run_dir} is no run, or it has no checkpoint yet"
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, batches: Any, config: ConfigDict) -> None:
        """Start writing a checkpoint; the state may be donated as soon as this returns.

        Raises:
          CheckpointError: this save, or the one before it, failed; the checkpoints before are whole.
        """
        items = _split(state)
        checksums = {name: _checksums(x) for name, x in items.items()} | {"data": _crc(batches.get_state())}
        about: dict[str, Any] = {"config": as_json(config), "checksums": checksums}
        about["checksum"] = _crc(about)
        args = {name: ocp.args.StandardSave(x) for name, x in items.items()}
        args |= {"about": ocp.args.JsonSave(about), "data": grain.checkpoint.CheckpointSave(batches)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(error) from error

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes were told to stop and agree on this step to do so."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Return once every started save is on disk. Raises CheckpointError if one failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Finish what was started and let go."""
        self.wait()
        self._manager.close()

    def about(self, step: int) -> dict[str, Any]:
        """The config and the checksums stored at `step`."""
        about = self._read(step, {"about": ocp.args.JsonRestore()})["about"]
        if about.pop("checksum", None) != _crc(about):
            raise self._read_error(step, "about is not what was written")
        return about

    def restore(self, step: int, like: TrainState, batches: Any) -> TrainState:
        """Read a checkpoint back and move the data iterator to its place.

        Args:
          step: which one.
          like: shapes, dtypes and shardings of the state (`Layout.abstract`).
          batches: the run's data iterator, set to the checkpoint's place.

        Raises:
          CheckpointError: a file is missing, truncated or altered; it names the file or the array.
        """
        items = _split(like)
        args = {name: ocp.args.StandardRestore(x) for name, x in items.items()}
        args["data"] = grain.checkpoint.CheckpointRestore(batches)
        read = self._read(step, args)
        read = {name: _own(read[name]) for name in items}
        self._check(step, read)
        if self.about(step)["checksums"]["data"] != _crc(batches.get_state()):
            raise self._read_error(step, "data is not what was written")
        return TrainState(params=read["params"], ema=read.get("ema"), **read["training"])

    def restore_params(self, step: int, like: Any, *, ema: bool) -> Any:
        """Only the params (or their moving average), as evaluation and generation need them."""
        name = "ema" if ema else "params"
        read = self._read(step, {name: ocp.args.StandardRestore(like)})
        self._check(step, read)
        return read[name]

    def _read(self, step: int, args: dict[str, Any]) -> dict[str, Any]:
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**args))
            return {name: read[name] for name in args}
        except Exception as error:  # each of Orbax, TensorStore, json and Grain raises its own
            raise self._read_error(step, error) from error

    def _check(self, step: int, read: dict[str, Any]) -> None:
        stored = self.about(step)["checksums"]
        for name, tree in read.items():
            for path, found in _checksums(tree).items():
                if stored[name].get(path) != found:
                    raise self._read_error(step, f"{name}{path} is not what was written")

    def _read_error(self, step: int, error: Any) -> CheckpointError:
        others = [s for s in self._manager.all_steps() if s < step]
        remedy = "remove that folder to start from the beginning"
        if others:
            remedy = f"remove that folder to go on from step {max(others)} instead"
        return CheckpointError(
            f"{self.folder / str(step)} is corrupt or truncated: {error}\nTo go on, {remedy}."
        )

    def _write_error(self, error: Exception) -> CheckpointError:
        steps = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]
        last = (
            f"the last whole checkpoint is step {max(steps)}" if steps else "no checkpoint was written before"
        )
        return CheckpointError(
            f"{self.folder} could not be written: {error}\nOlder ones are untouched: {last}."
        )


def check_same_config(stored: dict[str, Any], config: ConfigDict, where: str | Path) -> None:
    """Raise ValueError naming every field in which `config` is not the one a checkpoint was made with."""
    old, new = _flat(stored), _flat(as_json(config))
    fields = sorted(k for k in old | new if k.split(".")[0] not in MAY_CHANGE and old.get(k) != new.get(k))
    if fields:
        listing = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in fields)
        raise ValueError(
            f"{where} has checkpoints of another config:\n{listing}\n"
            "Use another --run, or remove that folder."
        )


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON keeps it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _split(state: TrainState) -> dict[str, Any]:
    training = {"step": state.step, "optimizer": state.optimizer, "rng": state.rng}
    items = {"params": state.params, "training": training}
    return items if state.ema is None else items | {"ema": state.ema}


def _crc(tree: Any) -> int:
    """A checksum of JSON."""
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


@jax.jit
def _own(tree):
    """Copies in buffers that XLA allocated: what a step donates must not be memory the reader still holds."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _sums(tree):
    def words(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
        return jnp.sum(x.astype(jnp.uint32))  # modulo 2**32: any order, on any number of devices, the same

    return jax.tree.map(words, tree)


def _checksums(tree) -> dict[str, int]:
    """For each array, the sum of its bits as 32-bit words: one flipped bit anywhere changes it."""
    leaves = jax.tree_util.tree_leaves_with_path(_sums(tree))
    return {jax.tree_util.keystr(path): int(total) for path, total in leaves}
