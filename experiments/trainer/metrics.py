"""Records of a run: a progress bar, metrics.jsonl, TensorBoard events, the loss curve."""

import json
import math
import os
import sys
import time
from pathlib import Path

LINE_EVERY_S = 10  # without a terminal: one plain line at most this often


class Metrics:
    """Metrics of one run; on every process but the first, all methods do nothing."""

    def __init__(self, run_dir: str | Path, *, first_step: int, steps: int, tensorboard: bool, enabled: bool):
        """Open RUN/metrics.jsonl after dropping what a killed run logged past its last checkpoint.

        Args:
          first_step: steps already taken: only lines up to it stay.
          steps: how long the run is.
          tensorboard: also write RUN/tensorboard.
          enabled: False on every process but the first.
        """
        self._enabled = enabled
        if not enabled:
            return
        from tqdm import tqdm

        run_dir = Path(run_dir)
        keep_lines(run_dir / "metrics.jsonl", first_step)
        self._file = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=steps, initial=first_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        self._steps, self._shown_at, self._done = steps, 0.0, first_step
        self._started, self._first_step = time.monotonic(), first_step
        self._smooth: float | None = None

    def log(self, step: int, values: dict[str, float], *, write: bool) -> None:
        """Show one step, and if `write` put it in the files.

        Args:
          step: its number.
          values: any metrics; tokens_per_second is among them, and loss and bits_per_byte unless the step was
            skipped.
          write: whether the files get a line.
        """
        if not self._enabled:
            return
        if write:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            if self._tensorboard:
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
        # One batch says little: the bar shows an average over about the last twenty.
        if "bits_per_byte" in values:
            bits = values["bits_per_byte"]
            self._smooth = bits if self._smooth is None else 0.95 * self._smooth + 0.05 * bits
        smooth = math.nan if self._smooth is None else self._smooth
        loss, speed = values.get("loss", math.nan), values["tokens_per_second"]
        shown = f"loss {loss:.3f}, {smooth:.3f} bits/byte, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(step - self._done)
        self._done = step
        now = time.monotonic()
        if self._bar.disable and (now - self._shown_at >= LINE_EVERY_S or step == self._steps):
            left = (now - self._started) / (step - self._first_step) * (self._steps - step)
            self.say(f"step {step}/{self._steps}: {shown}, {left:,.0f} s left")
            self._shown_at = now

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush and close all files."""
        if not self._enabled:
            return
        self._bar.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without the torn one that a killed process may have left last."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


def keep_lines(path: Path, last_step: int) -> None:
    """Rewrite a metrics.jsonl, atomically, with only the steps up to `last_step`."""
    kept = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def plot_loss(run_dir: str | Path, references: dict[str, float]) -> Path | None:
    """Draw RUN/loss.png from RUN/metrics.jsonl.

    Args:
      references: bits per byte of what the run is compared with, drawn as lines.

    Returns:
      The picture's path; None where nothing was logged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in read_lines(Path(run_dir) / "metrics.jsonl") if "bits_per_byte" in line]
    if not lines:
        return None
    evaluated = [line for line in lines if "held_out_bits_per_byte" in line]
    steps = [line["step"] for line in lines]
    bits = [line["bits_per_byte"] for line in lines]
    smooth, value = [], bits[0]
    for x in bits:
        value = 0.95 * value + 0.05 * x
        smooth.append(value)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, bits, color="0.8", linewidth=0.8, label="each batch")
    axes.plot(steps, smooth, color="C0", label="average")
    if evaluated:
        values = [line["held_out_bits_per_byte"] for line in evaluated]
        axes.plot([line["step"] for line in evaluated], values, "o-", color="C0", label="held out")
    for i, (name, y) in enumerate(references.items()):
        axes.axhline(y, color=f"C{i + 1}", linestyle="--", linewidth=1, label=f"{name}: {y:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, min(8.5, 1.05 * max(bits))))
    axes.legend()
    path = Path(run_dir) / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
