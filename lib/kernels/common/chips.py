"""The chips that kernels are sized for and plans made for, and the limits that hold on all of them."""

from dataclasses import dataclass

GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclass(frozen=True)
class TPU:
    """One tensor core of a TPU: a kernel runs on one, whatever the chip has."""

    vmem: int  # bytes
    bandwidth: float  # of HBM, bytes a second
    peak: float  # bfloat16 FLOPs a second
    clock: float  # cycles a second


@dataclass(frozen=True)
class GPU:
    """A Hopper GPU."""

    processors: int  # streaming multiprocessors
    bandwidth: float  # of HBM, bytes a second
    peak: float  # dense bfloat16 FLOPs a second
    clock: float  # boost, cycles a second


# VMEM, bandwidth and peak of a core: `jax.experimental.pallas.tpu.get_tpu_info_for_chip`. Clocks: the peak
# over FLOPs a cycle, 131,072 on v5e and v5p. v6e is taken to do 524,288; tpu7x's clock is not published,
# and 2.2 GHz makes its peak as many a cycle.
TPUS = {
    "v5e": TPU(vmem=128 * MIB, bandwidth=820e9, peak=197e12, clock=1.5e9),
    "v5p": TPU(vmem=64 * MIB, bandwidth=1230e9, peak=229.5e12, clock=1.75e9),
    "v6e": TPU(vmem=128 * MIB, bandwidth=1640e9, peak=920e12, clock=1.75e9),
    "tpu7x": TPU(vmem=64 * MIB, bandwidth=3700e9, peak=1155e12, clock=2.2e9),
}

# NVIDIA's data sheets of H100 (2023) and H200 (2024); processors and clocks as CUDA's device properties say.
GPUS = {
    "H100 PCIe": GPU(processors=114, bandwidth=2.0e12, peak=756e12, clock=1.755e9),
    "H100 SXM": GPU(processors=132, bandwidth=3.35e12, peak=989e12, clock=1.98e9),
    "H200": GPU(processors=132, bandwidth=4.8e12, peak=989e12, clock=1.98e9),
}


@dataclass(frozen=True)
class Device:
    """One device of a system of many, as JAX counts devices; a tpu7x chip is two of them."""

    peak: float  # dense bfloat16 FLOPs a second
    memory: int  # bytes of HBM
    bandwidth: float  # of HBM, bytes a second
    clock: float  # cycles a second
    link: float  # bytes a second that it can send over one link, of which a torus has two a dimension
    network: float  # bytes a second that it can send to another slice or host
    closes: int = (
        1  # a dimension of the torus is a ring where its size is a multiple of this; otherwise a line
    )


# Google Cloud's pages of TPU v5e, v5p, v6e and TPU7x: peak, HBM and its bandwidth, the bidirectional ICI
# bandwidth a chip (400, 1200, 800 and 1200 GB/s over 4, 6, 4 and 6 ports: half of a port's is one way), the
# data center network (6.4 Tb/s a pod of 256, 50 Gb/s a chip, 25.6 Tb/s a pod of 256, 100 Gb/s a chip).
# NVIDIA's data sheets of H100 and H200: NVLink's 900 GB/s are both ways together, here two links of one way;
# of DGX: a GPU has 400 Gb/s to other hosts.
DEVICES = {
    "v5e": Device(197e12, 16 * GIB, 819e9, TPUS["v5e"].clock, link=50e9, network=3.125e9, closes=16),
    "v5p": Device(459e12, 95 * GIB, 2765e9, TPUS["v5p"].clock, link=100e9, network=6.25e9, closes=4),
    "v6e": Device(918e12, 32 * GIB, 1638e9, TPUS["v6e"].clock, link=100e9, network=12.5e9, closes=16),
    "tpu7x": Device(1153.5e12, 96 * GIB, 3690e9, TPUS["tpu7x"].clock, link=50e9, network=6.25e9, closes=4),
    "h100": Device(989e12, 80 * 10**9, 3.35e12, GPUS["H100 SXM"].clock, link=225e9, network=50e9),
    "h200": Device(989e12, 141 * 10**9, 4.8e12, GPUS["H200"].clock, link=225e9, network=50e9),
}

# TPU: a vector register is SUBLANES rows of LANES 32-bit values on every generation ("A Domain-Specific
# Supercomputer for Training Deep Neural Networks", 2020); narrower types pack 2 or 4 rows in one.
LANES = 128
SUBLANES = 8
# Bytes of VMEM that a kernel may hold on any of the chips: blocks are chosen by it and compiled with it. The
# smallest has 64 MiB, of which XLA wants some for what it fetches ahead; the widest kernel measured takes 37.
VMEM_LIMIT = 48 * MIB

# Hopper, compute capability 9.0 in the CUDA C++ Programming Guide's table of technical specifications.
SHARED_MEMORY = 227 * KIB  # bytes that one block may hold; a processor has 228 KiB
REGISTERS = 255  # 32-bit ones that a thread may hold; a processor has 65,536
WARPGROUP = 128  # threads that a wgmma instruction is issued by
# Programs that count as filling a GPU: as many as the smallest of the three has processors. 128, a common
# batch times heads, fills 132 well enough.
PROCESSORS = min(gpu.processors for gpu in GPUS.values())


def target_config(chip: str) -> str:
    """A GpuTargetConfigProto in text: what XLA asks a driver about a GPU; without one it compiles by this.

    Args:
      chip: "h100" or "h200".

    Example:
        >>> from frugax.kernels.common.chips import target_config
        >>> "core_count: 132" in target_config("h200")
        True
    """
    gpu, device = GPUS[{"h100": "H100 SXM", "h200": "H200"}[chip]], DEVICES[chip]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {SHARED_MEMORY} shared_memory_per_core: 233472
  core_count: {gpu.processors} fpus_per_core: 128
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: {gpu.clock / 1e9}
  device_memory_size: {device.memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.upper()}"
"""
