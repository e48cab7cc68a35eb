"""Atomic checkpoints of a run, written while it goes on, the newest and the best kept, checked when read.

RUN/checkpoints/<step>/ holds params, average (the params to use, where those are not the trained ones),
training (optimizer state, RNG, step), collections (the model's variables that are no params, where it has
some), data (the iterator's place, the same for any number of processes) and about (the config, held-out bits
per byte where they were measured, and a checksum of every array).
"""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from experiments.configs.checks import flatten
from experiments.configs.defaults import defaults
from experiments.trainer.state import TrainState, params_to_use

# What may differ between a checkpoint's config and the run that goes on from it: it changes nothing that the
# checkpoint holds. A new number of steps changes the schedule of those still to come.
MAY_CHANGE = (
    "steps",
    "run_dir",
    "parallel",
    "mesh",
    "memory",
    "distributed",
    "skip_nonfinite",
    "log_every",
    "tensorboard",
    "checkpoint",
    "evaluation",
    "sample",
)


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or read back."""


class _Newest(preservation_policy.PreservationPolicy):
    """Keeps the newest checkpoints, and the best."""

    def __init__(self, keep: int, checkpoints: "Checkpoints"):
        self._keep, self._checkpoints = keep, checkpoints

    def should_preserve(self, checkpoints, *, context):
        steps = sorted(info.step for info in checkpoints)
        kept = {*steps[-self._keep :], self._checkpoints.best_step()}
        return [info.step in kept for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_dir: str | Path, *, keep: int = 2, read_only: bool = False):
        """Open RUN/checkpoints, clearing what an interrupted save left there.

        Args:
          run_dir: the run's folder; made if missing.
          keep: how many of the newest stay, at least 1; the best one stays too.
          read_only: for evaluation and generation: makes and removes nothing.
        """
        self.folder = Path(run_dir).absolute() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"run: got {run_dir}, which has no checkpoints; expected a folder of experiments.train"
            )
        self._bits: dict[int, float] = {}  # held-out bits per byte, by step
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.PreserveAll() if read_only else _Newest(keep, self),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(CheckpointError):  # a spoiled one is named when it is read
                self._note(step, self.about(step).get("held_out_bits_per_byte"))

    def find(self, step: int | str | None) -> int:
        """The step of a checkpoint: this one if it is there, the newest for None, or the "best".

        Raises:
          CheckpointError: there is none.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(f"run: got {self.folder.parent}, which has no checkpoint yet; expected one")
        if step == "best" and not self._bits:
            raise CheckpointError(
                f"step: got 'best'; expected evaluation.every above 0 in {self.folder}'s run"
            )
        found = {None: steps[-1], "best": self.best_step()}.get(step, step)
        if found not in steps:
            there_are = ", ".join(map(str, steps))
            raise CheckpointError(f"step: got {step}; expected one of {there_are}, which {self.folder} holds")
        return int(found)

    def best_step(self) -> int | None:
        """The step of the checkpoint with the fewest held-out bits per byte; None where none was measured."""
        return min(self._bits, key=lambda step: (self._bits[step], step), default=None)

    def bits_of(self, step: int) -> float | None:
        """Held-out bits per byte of a checkpoint; None where they were not measured."""
        return self._bits.get(step)

    def _note(self, step: int, bits: float | None) -> None:
        if bits is not None:
            self._bits[step] = bits

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, batches: Any, config: ConfigDict, *, bits: float | None = None
    ) -> None:
        """Start writing a checkpoint; the state may be donated as soon as this returns.

        Args:
          step: its name.
          state: all of it is stored.
          batches: the data iterator.
          config: the run's.
          bits: held-out bits per byte of the params to use; None where they were not measured.

        Raises:
          CheckpointError: this save, or the one before it, failed; the checkpoints before are whole.
        """
        items = _split(state)
        average = params_to_use(state)
        if average is not state.params:
            items["average"] = average
        checksums = {name: _checksums(x) for name, x in items.items()} | {"data": _crc(batches.get_state())}
        about: dict[str, Any] = {"config": as_json(config), "checksums": checksums}
        if bits is not None:
            about["held_out_bits_per_byte"] = bits
        self._note(step, bits)
        about["checksum"] = _crc(about)
        args = {name: ocp.args.StandardSave(x) for name, x in items.items()}
        args |= {"about": ocp.args.JsonSave(about), "data": ocp.args.JsonSave(batches.get_state())}
        try:
            self._manager.save(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(error) from error

    def reached_preemption(self, step: int) -> bool:
        """Tell if all processes were told to stop and agree on this step to do so."""
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

    def release(self) -> None:
        """Let go, whatever became of what was started: nothing writes in the folder any more."""
        for end in (self._manager.wait_until_finished, self._manager.close):
            with contextlib.suppress(Exception):  # it was raised before
                end()

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
        args["data"] = ocp.args.JsonRestore()
        read = self._read(step, args)
        place = read.pop("data")
        read = {name: _own(read[name]) for name in items}
        self._check(step, read)
        if self.about(step)["checksums"]["data"] != _crc(place):
            raise self._read_error(step, "data is not what was written")
        try:
            batches.set_state(place)
        except ValueError as error:
            raise self._read_error(step, error) from error
        training, collections = read["training"], read.get("collections", {})
        return TrainState(params=read["params"], ema=read.get("average"), collections=collections, **training)

    def restore_params(self, step: int, like: Any, *, trained: bool = False) -> Any:
        """Only the params to use, as evaluation and generation need them.

        Args:
          step: which one.
          like: shapes, dtypes and shardings of the params; an average has a dtype of its own.
          trained: the params as they were trained, and not their average.
        """
        name = "average" if not trained and "average" in self.about(step)["checksums"] else "params"
        if name == "average" and self.about(step)["config"]["ema_decay"]:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), like
            )
        read = self._read(step, {name: ocp.args.StandardRestore(like)})
        self._check(step, read)
        return read[name]

    def restore_collections(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """The model's variables that are no params; `like` has their shapes, dtypes and shardings."""
        if not like:
            return {}
        read = self._read(step, {"collections": ocp.args.StandardRestore(like)})
        self._check(step, read)
        return read["collections"]

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
    """Raise ValueError naming every field in which `config` is not the one a checkpoint was made with.

    A field that is newer than the checkpoint had today's default then.
    """
    new = flatten(as_json(config))
    old = {k: v for k, v in flatten(as_json(defaults())).items() if k in new} | flatten(stored)
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


def _split(state: TrainState) -> dict[str, Any]:
    training = {"step": state.step, "optimizer": state.optimizer, "rng": state.rng, "skipped": state.skipped}
    items = {"params": state.params, "training": training}
    items |= {"collections": state.collections} if state.collections else {}
    return items if state.ema is None else items | {"average": state.ema}


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
