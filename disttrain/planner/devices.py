"""Speeds of the devices in `disttrain.hardware`: the vendor's peaks, and what others have measured of them. No torch.

Nothing here is taken from a training run, and nothing was chosen by what the planner then predicts. Sources:

- products: "Maximum Achievable Matmul FLOPS" in bf16, Bekman, Machine Learning Engineering, compute/accelerator
  (https://github.com/stas00/ml-engineering), torch 2.5 to 2.7; processors: the vendors' white papers;
- memory: a copy on the device reaches 2,903 of 3,350 GB/s (Voltage Park and AI at Georgia Tech, 32 H100 SXM);
- attention: FlashAttention-2's forward pass on an H100 SXM, causal, heads of 128 (Shah et al. 2024, figure 5); 73 % of an
  A100's peak forward and 63 % backward (Dao 2023, section 4.1), and the same decline backward on others;
- inside a host: a ring over 8 H200 reaches 367.6 of 450 GB/s (Bekman, ibid., network); 3.4 us a step over NVLink, 5.7 us
  over PCIe, 9.6 us between hosts (NCCL, src/graph/tuning.cc, Ring/Simple);
- between hosts: an all-reduce over 4 hosts of 8 H100, with 8 adapters of 400 Gbit/s each, reaches 331 of 400 GB/s (Voltage
  Park, ibid.);
- a collective keeps 16 processors busy, one a channel. An assumption: up to 32 are seen (NVIDIA/nccl, issue 1685);
- kept by CUDA: about 300 MB (pytorch/pytorch, issue 107667); by NCCL: 688 MiB for a group (NVIDIA/nccl, issue 964).
"""

from typing import NamedTuple

from disttrain.config.problems import Problem, RefusedInput
from disttrain.hardware import DEVICES, GIGA, TERA, Device, lookup
from disttrain.planner.speeds import Attention, Link, MatrixUnit, Speeds


class Known(NamedTuple):
    """What is known of a device beside the vendor's table."""

    processors: int
    """Streaming multiprocessors (NVIDIA), or compute units (AMD)."""
    best_product: float | None = None
    """FLOP/s in bf16 that somebody has measured."""
    adapter_gigabits: float | None = None
    """Per second and GPU, between hosts, of the vendor's own machines (DGX, or AMD's reference)."""


KNOWN = {
    "a100-pcie-40gb": Known(108, 252.9 * TERA),
    "a100-pcie-80gb": Known(108, 252.9 * TERA),
    "a100-sxm-40gb": Known(108, 271.2 * TERA, 200),
    "a100-sxm-80gb": Known(108, 271.2 * TERA, 200),
    "h100-pcie": Known(114),
    "h100-sxm": Known(132, 794.5 * TERA, 400),
    "h100-nvl": Known(132),
    "h200-sxm": Known(132, 794.5 * TERA, 400),
    "h200-nvl": Known(132),
    "b200": Known(148, None, 400),
    "l4": Known(58),
    "l40s": Known(142),
    "v100-sxm": Known(80),
    "v100-sxm-32gb": Known(80),
    "v100-pcie": Known(80),
    "v100-pcie-32gb": Known(80),
    "t4": Known(40),
    "rtx-4090": Known(128),
    "rtx-3090": Known(82),
    "mi250x": Known(110, 147.0 * TERA),
    "mi300x": Known(304, 668.4 * TERA, 400),
}

MEMORY_SHARE = 2903 / 3350
RING_SHARE = 367.6 / 450
ADAPTER_SHARE = 331 / 400
NVLINK_SECONDS, PCIE_SECONDS, BETWEEN_SECONDS = 3.4e-6, 5.7e-6, 9.6e-6
PCIE_BYTES_PER_SECOND = 64 * GIGA
"""What no link but NVLink and Infinity Fabric exceeds."""
LAUNCH_SECONDS = 8e-6
"""Of torch for an operator. An assumption: from 5 to 25 us are reported."""
CHANNELS = 16
CONTEXT_BYTES, GROUP_BYTES = 300e6, 688 * 2**20
FORWARD_ON_H100 = {512: 191, 1024: 260, 2048: 298, 4096: 319, 8192: 333, 16384: 335}
"""TFLOP/s by sequence length; the same kernel reaches 370 without a mask."""
UNMASKED_ON_H100 = 370 * TERA
FORWARD_ON_A100, BACKWARD_SHARE = 0.73 * 312 * TERA, 0.63 / 0.73


def speeds_of(
    name: str, precision: str, world: int, ranks_per_host: int = 8, between_gigabits: float | None = None
) -> Speeds:
    """Of a device of the table, by any name that `hardware.lookup` takes.

    Raises RefusedInput for a name that is not in it, a precision without a peak, and hosts without a known network.
    """
    device = lookup(name)
    short = next((key for key, row in DEVICES.items() if row is device), None)
    if device is None or short is None:
        problem = "it is not in the table of devices"
        fix = f"use measured, a JSON file of `disttrain calibrate`, or one of {', '.join(DEVICES)}"
        raise RefusedInput([Problem((f"--device {name}",), problem, fix)])
    if precision not in device.peak:
        known = ", ".join(p for p in device.peak if p in ("fp32", "bf16", "fp16"))
        message = "the table has no speed of this device in that precision"
        raise RefusedInput([Problem((f"--device {short}", f"precision={precision}"), message, f"use one of {known}")])
    facts = KNOWN[short]
    gigabits = between_gigabits or facts.adapter_gigabits
    if gigabits is None and world > ranks_per_host:
        message = "nothing is known of the network between hosts with this device"
        fix = "give --between-gbps, Gbit/s of each GPU"
        raise RefusedInput([Problem((f"--device {short}", f"--gpus {world}"), message, fix)])
    return _speeds(device, short, facts, precision, ranks_per_host, gigabits or 0.0)


def _speeds(device: Device, short: str, facts: Known, precision: str, host: int, gigabits: float) -> Speeds:
    peak, half = device.peak[precision], precision in ("bf16", "fp16")
    best = facts.best_product if half and facts.best_product else peak
    nvlink = device.link_bytes_per_second > PCIE_BYTES_PER_SECOND
    inside = Link(NVLINK_SECONDS if nvlink else PCIE_SECONDS, RING_SHARE * device.link_bytes_per_second)
    between = Link(BETWEEN_SECONDS, ADAPTER_SHARE * gigabits / 8 * GIGA) if gigabits else inside
    return Speeds(
        device=short,
        source=f"{device.source}; disttrain.planner.devices",
        precision=precision,
        products=(),
        memory_bytes=device.memory_bytes,
        memory_bytes_per_second=MEMORY_SHARE * device.memory_bytes_per_second,
        operator_seconds=LAUNCH_SECONDS,
        ranks_per_host=host,
        at_full_speed=host,
        inside=inside,
        between=between,
        accelerator=True,
        unit=MatrixUnit(best, facts.processors),
        attention=_attention(short, best if half else None),
        peak_flops_per_second=peak,
        peak_source=device.source,
        context_bytes=CONTEXT_BYTES,
        group_bytes=GROUP_BYTES,
        collective_share=CHANNELS / facts.processors,
        notes=tuple(_notes(short, facts, half)),
    )


def _attention(short: str, best: float | None) -> tuple[Attention, ...]:
    """Points of the fused kernel, which is for half precision; empty in others, where scores are counted."""
    if best is None:
        return ()
    if short.startswith("a100"):
        unmasked = FORWARD_ON_A100
    elif short in ("h100-sxm", "h200-sxm"):
        unmasked = UNMASKED_ON_H100
    else:
        unmasked = best * UNMASKED_ON_H100 / (KNOWN["h100-sxm"].best_product or best)
    points = []
    for length, reached in FORWARD_ON_H100.items():
        forward = unmasked * reached * TERA / UNMASKED_ON_H100
        points.append(Attention(length, 128, forward, BACKWARD_SHARE * forward))
    return tuple(points)


def _notes(short: str, facts: Known, half: bool) -> list[str]:
    """What of a row is assumed, for the reader of a plan."""
    notes = []
    if not half or facts.best_product is None:
        notes.append("nobody's best product is known here: products reach the datasheet's peak, times are too short")
    if not short.startswith("a100") and short not in ("h100-sxm", "h200-sxm"):
        notes.append("attention, memory and links reach the shares that were measured on an H100")
    notes.append("the allocator's fragments are not counted: leave some of the memory")
    return notes
