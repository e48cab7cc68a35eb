"""A model of the time and memory of training over a mesh, along the critical path of its pipeline."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Cluster(NamedTuple):
    """Devices and the links between them.

    Attributes:
      bandwidth: bytes a second from each device to each, [D, D]; measured ones, where links differ.
      flops: of one device, a second.
      memory: bytes of one device.
    """

    bandwidth: np.ndarray
    flops: float
    memory: float


class Workload(NamedTuple):
    """Costs of a training step of a model of equal layers.

    Attributes:
      layers: how many.
      batch: sequences of a step.
      time: tokens of a sequence.
      layer_flops: of one layer's forward pass, for a token; a backward pass takes twice as many.
      layer_gradients: bytes of one layer's gradients.
      layer_state: bytes of one layer's params, gradients and optimizer state.
      outer_gradients, outer_state: of the embedding and the head, which the busiest stage holds.
      stream: bytes of a token between layers.
      kept: bytes of a token that one layer keeps for its backward pass, split over a tensor axis.
      kept_whole: likewise, of which each device of a tensor axis keeps a copy.
    """

    layers: int
    batch: int
    time: int
    layer_flops: float
    layer_gradients: int
    layer_state: int
    outer_gradients: int
    outer_state: int
    stream: int
    kept: int
    kept_whole: int


class Configuration(NamedTuple):
    """Sizes of the mesh axes, and sequences of a microbatch on one copy of the model."""

    pipeline: int = 1
    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    microbatch: int = 1

    @property
    def axes(self) -> tuple[int, ...]:
        """Sizes of the axes, in the order of `frugax.parallel.AXES`."""
        return self[:5]

    def microbatches(self, batch: int) -> int:
        """Microbatches of a step."""
        return batch // (self.data * self.fsdp * self.microbatch)


class Traffic(NamedTuple):
    """Bytes that a device of the first stage sends in a step, by mesh axis.

    Attributes:
      pipeline: outputs of the stage, of all microbatches; as many bytes of gradients come back.
      data: gradients, added up over copies.
      fsdp_params: params, gathered for the forward and the backward pass of each microbatch.
      fsdp_gradients: gradients, added up and kept in parts.
      sequence: four all-to-alls of the stream in each layer and pass (Ulysses).
      tensor: two all-reduces of the stream in each layer and pass (Megatron).
    """

    pipeline: float
    data: float
    fsdp_params: float
    fsdp_gradients: float
    sequence: float
    tensor: float


class Latency(NamedTuple):
    """Seconds of a step, by what takes them.

    Attributes:
      compute: of the stage's microbatches, with all that a microbatch waits for inside a stage.
      bubble: of filling and emptying the pipeline.
      messages: between stages, as far as the critical path meets them.
      gradients: of adding gradients up over copies, after the last backward pass.
    """

    compute: float
    bubble: float
    messages: float
    gradients: float

    @property
    def seconds(self) -> float:
        """Their sum."""
        return sum(self)


def transformer_workload(
    *, layers: int, width: int, batch: int, time: int, vocab: int = 0, state_itemsize: int = 16
) -> Workload:
    """Count a GPT: softmax attention with stored scores left out, an MLP of 4 widths, params of 2 bytes.

    Args:
      layers, width: of the model.
      batch: sequences of a step.
      time: tokens of a sequence.
      vocab: of the embedding and of a head of its own.
      state_itemsize: bytes of a param with its gradient and optimizer state; 16 of Adam in mixed precision.

    Source: Korthikanti et al. 2022 (arXiv 2205.05198) for activations, without dropout and scores.

    Example:
        >>> import frugax
        >>> frugax.planner.transformer_workload(layers=2, width=64, batch=8, time=32).layer_gradients
        98304
    """
    params = 12 * width**2
    flops = 2 * params + 2 * 2 * width * time
    outer = 2 * vocab * width
    return Workload(
        layers, batch, time, flops, 2 * params, state_itemsize * params, 2 * outer, state_itemsize * outer,
        2 * width, 2 * 12 * width, 2 * 4 * width,
    )  # fmt: skip


def device_bytes(work: Workload, c: Configuration) -> int:
    """Estimate the bytes of the busiest device, that of the first stage.

    It holds its share of the state, one layer's params gathered where the state is shared, and activations of
    as many microbatches as 1F1B has in flight.

    Example:
        >>> import frugax
        >>> work = frugax.planner.transformer_workload(layers=2, width=64, batch=8, time=32)
        >>> c = frugax.planner.Configuration(fsdp=2)
        >>> frugax.planner.device_bytes(work, c) < frugax.planner.device_bytes(work, c._replace(fsdp=1))
        True
    """
    layers = work.layers // c.pipeline
    state = (layers * work.layer_state + work.outer_state) / (c.tensor * c.fsdp)
    gathered = (work.layer_gradients / c.tensor) if c.fsdp > 1 else 0
    in_flight = min(c.pipeline, c.microbatches(work.batch))
    tokens = c.microbatch * work.time / c.sequence
    activations = in_flight * tokens * layers * (work.kept / c.tensor + work.kept_whole)
    return math.ceil(state + gathered + activations)


def traffic(work: Workload, c: Configuration) -> Traffic:
    """Count the bytes that a device of the first stage sends in a step.

    With n devices in a group, (n - 1) / n of an array is sent to gather it, to add it up in parts, or to
    exchange its parts, and twice as much to add it up for all.

    Source: Narayanan et al. 2021 (arXiv 2104.04473); Rajbhandari et al. 2019, ZeRO (arXiv 1910.02054).

    Example:
        >>> import frugax
        >>> work = frugax.planner.transformer_workload(layers=2, width=64, batch=8, time=32)
        >>> frugax.planner.traffic(work, frugax.planner.Configuration(data=2)).data  # 2 bytes a param
        196608.0
    """
    layers, M = work.layers // c.pipeline, c.microbatches(work.batch)
    stream = c.microbatch * work.time // c.sequence * work.stream  # of a microbatch on one device
    stage = layers * work.layer_gradients / c.tensor
    whole = stage + work.outer_gradients / c.tensor
    return Traffic(
        pipeline=float(M * stream * (c.pipeline > 1)),
        data=2 * _part(c.data) * whole / c.fsdp,
        fsdp_params=M * 2 * _part(c.fsdp) * stage,
        fsdp_gradients=_part(c.fsdp) * whole,
        sequence=M * layers * 2 * 4 * _part(c.sequence) * stream,
        tensor=M * layers * 2 * 2 * 2 * _part(c.tensor) * stream,
    )


def latency(
    work: Workload, c: Configuration, cluster: Cluster, placement: Sequence[int] | None = None
) -> Latency:
    """Model the seconds of a step with 1F1B, along the critical path of its pipeline.

    With P stages, M microbatches and c seconds of one in a stage

        seconds = M c + (P - 1) c + R 2 sum_i message / bandwidth_i + gradients

    1F1B holds no more than P microbatches, so a microbatch waits for one before it to go down the pipeline
    and back: messages are met in R, about M / P, rounds and not once. R is exactly that of
    `pipeline_timeline` for links of equal speed. A stage's collectives take as long as the slowest link
    of the slowest group lets them; gradients are those of the first stage, which is the last to finish.

    Args:
      work: of the model.
      c: sizes of the mesh; they multiply to the cluster's devices.
      cluster: its devices and links.
      placement: the device at each place of the mesh, the last axis fastest; None: in order.

    Returns:
      Its `Latency`.

    Raises:
      ValueError: sizes don't multiply to the number of devices, or `placement` is no order of them.

    Source: Yim et al. 2024, Pipette (arXiv 2405.18093); its public code for the messages' costs.

    Example:
        >>> import frugax, numpy as np
        >>> work = frugax.planner.transformer_workload(layers=2, width=64, batch=8, time=32)
        >>> cluster = frugax.planner.Cluster(np.full((2, 2), 1e9), flops=1e12, memory=1e9)
        >>> found = frugax.planner.latency(work, frugax.planner.Configuration(pipeline=2), cluster)
        >>> found.bubble == found.compute / 8
        True
    """
    D = len(cluster.bandwidth)
    at = np.arange(D) if placement is None else np.asarray(placement)
    if math.prod(c.axes) != D:
        raise ValueError(f"configuration: got {c.axes}; expected sizes that multiply to {D} devices")
    if sorted(at.tolist()) != list(range(D)):
        raise ValueError(f"placement: got {at.tolist()}; expected each of {D} devices once")
    at = at.reshape(c.axes)
    P, M = c.pipeline, c.microbatches(work.batch)
    sent = traffic(work, c)

    def seconds(size: float, axis: int, places: np.ndarray = at) -> float:
        """Seconds of so many bytes over the slowest link of all rings along an axis."""
        links = cluster.bandwidth[places, np.roll(places, -1, axis)]
        return size / float(links.min()) if size else 0.0

    # All microbatches' seconds in a stage, forward and backward, with the collectives that they wait for.
    tokens = M * c.microbatch * work.time / c.sequence
    stage = 3 * work.layers / P * tokens * work.layer_flops / (c.tensor * cluster.flops)
    stage += seconds(sent.tensor, 4) + seconds(sent.sequence, 3) + seconds(sent.fsdp_params, 2)
    messages = 0.0
    if P > 1:  # down the slowest pipeline and back
        links = cluster.bandwidth[at[:-1], at[1:]]
        messages = _rounds(P, M) * 2 * float((sent.pipeline / M / links).sum(0).max())
    gradients = seconds(sent.fsdp_gradients, 1, at[0]) + seconds(sent.data, 0, at[0])
    return Latency(stage, (P - 1) * stage / M, messages, gradients)


def _rounds(stages: int, microbatches: int) -> float:
    """Count the trips of 1F1B's critical path down all links or back, in units of P - 1 links."""
    if microbatches < 2:
        return 1.0
    later = microbatches - 2
    return 1 + (later - later // stages) / (stages - 1)


def _part(devices: int) -> float:
    return (devices - 1) / devices
