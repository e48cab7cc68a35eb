"""Start a config's training: here, in several processes, on Slurm, or in a cloud.

  python -m experiments.launch --config=FILE --on=local                     in this process
  python -m experiments.launch --config=FILE --on=processes:2 --restarts=3  two processes of this machine
  python -m experiments.launch --config=FILE --on=slurm:nodes=2,ntasks_per_node=8,gpus_per_node=8,time=600
  python -m experiments.launch --config=FILE --on=sky:accelerators=tpu-v5p-64,bucket=gs://NAME
  python -m experiments.launch --config=FILE --on=processes:2 --sweep model.width=64,128 --sweep seed=0,1

Further arguments are those of experiments.train: --config.a.b=value, --run=DIR. The same command again goes
on from the last checkpoint. --dry_run prints what would be started. docs/how-to/launch.md tells more.
"""

import argparse
import ast
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import train
from experiments.configs.checks import check_config
from experiments.launcher import sky, slurm
from experiments.launcher.local import Died, Stopped, commands, run_job, without_run
from experiments.launcher.sweep import Point, grid, read_summary, write_table
from experiments.trainer.flags import CONFIG, parse, run, run_dir
from experiments.trainer.kept_memory import keep_memory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="experiments.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--on", default="local", help="local, processes:N, slurm[:OPTIONS] or sky:OPTIONS")
    parser.add_argument("--dry_run", action="store_true", help="print what would be started")
    parser.add_argument(
        "--restarts", type=int, default=0, help="on this machine: how often a job that died starts again"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="a run for each value; with several, for each combination",
    )
    parser.add_argument(
        "--table", action="store_true", help="start nothing: write the table of what a sweep has reached"
    )
    return parser


def read_config(arguments: Sequence[str]) -> ConfigDict:
    """The checked config that `experiments.train` would have of these flags.

    Raises:
      ValueError: there is no --config, a field can't be right, or an argument is no flag.
    """
    flags.FLAGS.unparse_flags()
    argv, sys.argv = sys.argv, ["experiments.train", *arguments]  # where the config looks for its fields
    try:
        left = parse(sys.argv)[1:]
    finally:
        sys.argv = argv
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # the next parsing defines them again
    if left:
        raise ValueError(f"{left[0]!r} is no flag; fields of the config are given as --config.a.b=value")
    if CONFIG.value is None:
        raise ValueError("config: got nothing; expected --config=experiments/configs/lm/quickstart.py")
    check_config(CONFIG.value)
    return CONFIG.value


def launch(args: argparse.Namespace, arguments: list[str]) -> int:
    """Start what `args` (of `_parser`) say with these flags of `experiments.train`; the exit status."""
    where, _, text = args.on.partition(":")
    if where not in ("local", "processes", "slurm", "sky"):
        raise ValueError(f"on: got {args.on!r}; expected local, processes:N, slurm or sky:OPTIONS")
    if where == "local" and text:
        raise ValueError(f"on: got {args.on!r}; expected local alone, or processes:N")
    if where == "processes" and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"on: got {args.on!r}; expected processes:N with N of at least 1")
    if args.restarts < 0 or (args.restarts and where in ("slurm", "sky")):
        raise ValueError(f"restarts: got {args.restarts}; expected 0 or more, and 0 for slurm and sky")
    if args.table and not args.sweep:
        raise ValueError("table: got no sweep; expected --sweep as it was started")
    read_config(arguments)
    folder = Path(run_dir())
    points = grid(args.sweep, folder) if args.sweep else [Point({}, folder)]
    jobs = [[*without_run(arguments), *point.arguments] for point in points] if args.sweep else [arguments]
    steps = [read_config(job).steps for job in jobs]  # all are checked before the first starts
    if args.table:
        print(write_table(points, folder), end="")
        return 0
    if where in ("slurm", "sky"):
        return _submit(where, text, points, jobs, args.dry_run)
    count = int(text) if where == "processes" else 1
    if args.dry_run:
        for job in jobs:
            for command in commands(job, count):
                print(shlex.join(command))
        return 0
    if args.sweep:
        return _sweep_here(points, jobs, steps, count, args.restarts, folder)
    if where == "local" and not args.restarts:
        run(train.main, ["experiments.train", *arguments])
        return 0
    try:
        run_job(arguments, count, restarts=args.restarts, say=_say)
    except Died as error:
        raise Died(f"{error}. The same command goes on from the last checkpoint in {folder}") from error
    return 0


def _sweep_here(points, jobs, steps, count: int, restarts: int, folder: Path) -> int:
    """Run the points one after the other, and write the table after each; 1 if one of them failed."""
    from tqdm import tqdm

    failed = []
    with tqdm(total=len(points), unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def say(line: str) -> None:
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()

        for number, (point, job, end) in enumerate(zip(points, jobs, steps, strict=True), 1):
            bar.set_postfix_str(point.folder.name)
            if read_summary(point.folder).get("step") == end:
                say(f"run {number} of {len(points)}: {point.folder} is finished")
            else:
                say(f"run {number} of {len(points)}: {point.folder}")
                try:
                    run_job(job, count, restarts=restarts, say=say)
                except Died as error:
                    failed.append(point.folder)
                    say(f"{point.folder}: {error}")
            text = write_table(points, folder)
            bar.update()
    print(f"\n{text}\nsweep.md and sweep.json are in {folder}")
    if failed:
        print(f"{len(failed)} of {len(points)} failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def _submit(where: str, text: str, points, jobs, dry_run: bool) -> int:
    options = _options(where, text)
    for point, job in zip(points, jobs, strict=True):
        if where == "slurm":
            logs = point.folder / "slurm"
            if dry_run:
                print(slurm.sbatch_file(job, options, logs))
            else:
                print(f"job {slurm.submit(job, options, logs)}: {point.folder}, with its logs in {logs}")
        else:
            name = "-".join(point.folder.parts[-2:] if point.fields else point.folder.parts[-1:])
            task = sky.make_task(job, options, name)
            sky.check_task(task)
            print(sky.as_yaml(task) if dry_run else f"{sky.submit(task)}: {point.folder}")
    return 0


def _options(where: str, text: str) -> dict[str, Any]:
    """The options of "a=1,b=x", numbers as numbers."""
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"on: got {item!r} in {where}:{text}; expected NAME=VALUE,NAME=VALUE")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = {"true": True, "false": False}.get(value, value)
    return options


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Parse arguments and launch; what the user can mend is one sentence."""
    args, arguments = _parser().parse_known_args(argv)
    try:
        return launch(args, arguments)
    except Stopped:
        print("stopped: the same command goes on from the last checkpoint")
        return 0
    except (ValueError, OSError, Died) as error:
        print(f"experiments.launch: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
