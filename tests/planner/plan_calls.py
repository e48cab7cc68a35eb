"""Run by test_plan.py on eight devices: the trainer's step over a mesh."""

import jax
import pytest

from experiments.configs.lm import quickstart
from experiments.plan import plan_config
from frugax import planner


def main():
    assert len(jax.devices()) == 8
    config = quickstart.get_config("smoke")
    config.batch_size = 8
    config.mesh.data, config.mesh.fsdp = 2, -1
    system = planner.topology("cpu:8")
    made = plan_config(config, system)
    assert made.mesh == {"data": 2, "fsdp": 4}
    whole = plan_config(quickstart.get_config("smoke"), planner.topology("cpu:1"))
    for kind in ("params", "optimizer", "gradients"):
        assert whole.bytes[kind] / 4 <= made.bytes[kind] < whole.bytes[kind] / 2
    assert made.bytes["batch"] == whole.bytes["batch"] // 2  # four times the rows on eight times the devices
    assert any("fsdp" in axes for axes, _ in made.collectives)
    config.mesh.data, config.mesh.fsdp = 1, 4
    with pytest.raises(
        ValueError, match="mesh: got fsdp=4, 4 devices; expected sizes that multiply to the 8 of cpu:8"
    ):
        plan_config(config, system)


main()
