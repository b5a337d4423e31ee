"""What the vendors say a device can do: dense peak FLOP/s, memory and links, each row with its source (no torch).

A name that is not in the table has no peak: nothing here guesses, since a wrong peak gives a wrong MFU. CPUs are not in
it, as their peak depends on core count, clock and instruction set.
"""

import platform
from pathlib import Path
from typing import NamedTuple

TERA = 1e12
GIGA = 1e9

CPUINFO = Path("/proc/cpuinfo")
GPUS = Path("/proc/driver/nvidia/gpus")


class Device(NamedTuple):
    """One accelerator as torch sees it (for MI250X, one of the two dies of a package)."""

    names: tuple[str, ...]
    """What `torch.cuda.get_device_name` says, without the vendor's "NVIDIA " and "Tesla "."""
    peak: dict[str, float]
    """Dense FLOP/s by data type, sums in fp32; a type that is missing is not multiplied natively.

    fp32 is without tensor cores (matrix cores for MI250X), tf32 what cuBLAS does when allowed to round.
    """
    memory_bytes: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """One direction, all links of a device together: half of what datasheets print. NVLink or Infinity Fabric; PCIe
    where the part has neither, or only a bridge between two cards."""
    source: str
    """Document and address."""


def _peak(fp32: float, tf32: float, half: float, fp8: float | None = None) -> dict[str, float]:
    """FLOP/s from TFLOP/s for the parts on which bf16 and fp16 are equally fast."""
    teras = {"fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half} | ({} if fp8 is None else {"fp8": fp8})
    return {name: value * TERA for name, value in teras.items()}


_A100 = "NVIDIA A100 datasheet, https://www.nvidia.com/en-us/data-center/a100/"
_H100 = "NVIDIA H100 datasheet (halved: it prints sparse peaks), https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "NVIDIA H200 datasheet (halved: it prints sparse peaks), https://www.nvidia.com/en-us/data-center/h200/"
_V100 = "NVIDIA V100 datasheet, https://www.nvidia.com/en-us/data-center/v100/"
_AMPERE = _peak(19.5, 156, 312)
_HOPPER_SXM = _peak(67, 494.5, 989.5, 1979)
_HOPPER_NVL = _peak(60, 417.5, 835.5, 1670.5)

DEVICES: dict[str, Device] = {
    "a100-pcie-40gb": Device(("A100-PCIE-40GB",), _AMPERE, 40 * GIGA, 1555 * GIGA, 32 * GIGA, _A100),
    "a100-pcie-80gb": Device(("A100 80GB PCIe",), _AMPERE, 80 * GIGA, 1935 * GIGA, 32 * GIGA, _A100),
    "a100-sxm-40gb": Device(("A100-SXM4-40GB",), _AMPERE, 40 * GIGA, 1555 * GIGA, 300 * GIGA, _A100),
    "a100-sxm-80gb": Device(("A100-SXM4-80GB",), _AMPERE, 80 * GIGA, 2039 * GIGA, 300 * GIGA, _A100),
    "h100-pcie": Device(("H100 PCIe",), _peak(51, 378, 756.5, 1513), 80 * GIGA, 2000 * GIGA, 64 * GIGA, _H100),
    "h100-sxm": Device(("H100 80GB HBM3",), _HOPPER_SXM, 80 * GIGA, 3350 * GIGA, 450 * GIGA, _H100),
    "h100-nvl": Device(("H100 NVL",), _HOPPER_NVL, 94 * GIGA, 3900 * GIGA, 64 * GIGA, _H100),
    "h200-sxm": Device(("H200",), _HOPPER_SXM, 141 * GIGA, 4800 * GIGA, 450 * GIGA, _H200),
    "h200-nvl": Device(("H200 NVL",), _HOPPER_NVL, 141 * GIGA, 4800 * GIGA, 64 * GIGA, _H200),
    "b200": Device(
        names=("B200",),
        peak=_peak(75, 1125, 2250, 4500),
        memory_bytes=180 * GIGA,
        memory_bytes_per_second=8000 * GIGA,
        link_bytes_per_second=900 * GIGA,
        source="NVIDIA HGX B200 specifications (an eighth of 8 GPUs, sparse peaks halved), "
        "https://www.nvidia.com/en-us/data-center/hgx/",
    ),
    "l4": Device(
        names=("L4",),
        peak=_peak(30.3, 60, 121, 242.5),
        memory_bytes=24 * GIGA,
        memory_bytes_per_second=300 * GIGA,
        link_bytes_per_second=32 * GIGA,
        source="NVIDIA L4 datasheet (halved: it prints sparse peaks), https://www.nvidia.com/en-us/data-center/l4/",
    ),
    "l40s": Device(
        names=("L40S",),
        peak=_peak(91.6, 183, 362.05, 733),
        memory_bytes=48 * GIGA,
        memory_bytes_per_second=864 * GIGA,
        link_bytes_per_second=32 * GIGA,
        source="NVIDIA L40S datasheet, https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    "v100-sxm": Device(
        names=("V100-SXM2-16GB",),
        peak={"fp32": 15.7 * TERA, "fp16": 125 * TERA},
        memory_bytes=16 * GIGA,
        memory_bytes_per_second=900 * GIGA,
        link_bytes_per_second=150 * GIGA,
        source=_V100,
    ),
    "v100-sxm-32gb": Device(
        names=("V100-SXM2-32GB",),
        peak={"fp32": 15.7 * TERA, "fp16": 125 * TERA},
        memory_bytes=32 * GIGA,
        memory_bytes_per_second=900 * GIGA,
        link_bytes_per_second=150 * GIGA,
        source=_V100,
    ),
    "v100-pcie": Device(
        names=("V100-PCIE-16GB",),
        peak={"fp32": 14 * TERA, "fp16": 112 * TERA},
        memory_bytes=16 * GIGA,
        memory_bytes_per_second=900 * GIGA,
        link_bytes_per_second=16 * GIGA,
        source=_V100,
    ),
    "v100-pcie-32gb": Device(
        names=("V100-PCIE-32GB",),
        peak={"fp32": 14 * TERA, "fp16": 112 * TERA},
        memory_bytes=32 * GIGA,
        memory_bytes_per_second=900 * GIGA,
        link_bytes_per_second=16 * GIGA,
        source=_V100,
    ),
    "t4": Device(
        names=("T4",),
        peak={"fp32": 8.1 * TERA, "fp16": 65 * TERA},
        memory_bytes=16 * GIGA,
        memory_bytes_per_second=300 * GIGA,
        link_bytes_per_second=16 * GIGA,
        source="NVIDIA T4 datasheet, https://www.nvidia.com/en-us/data-center/tesla-t4/",
    ),
    "rtx-4090": Device(
        names=("GeForce RTX 4090",),
        peak=_peak(82.6, 82.6, 165.2, 330.3),
        memory_bytes=24 * GIGA,
        memory_bytes_per_second=1008 * GIGA,
        link_bytes_per_second=32 * GIGA,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A (fp32 accumulation), "
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    "rtx-3090": Device(
        names=("GeForce RTX 3090",),
        peak=_peak(35.6, 35.6, 71.2),
        memory_bytes=24 * GIGA,
        memory_bytes_per_second=936 * GIGA,
        link_bytes_per_second=32 * GIGA,
        source="NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A (fp32 accumulation), "
        "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    "mi250x": Device(
        names=("AMD Instinct MI250X",),
        peak={"fp32": 47.85 * TERA, "bf16": 191.5 * TERA, "fp16": 191.5 * TERA},
        memory_bytes=64 * GIGA,
        memory_bytes_per_second=1600 * GIGA,
        link_bytes_per_second=200 * GIGA,
        source="AMD Instinct MI250X specifications (half a package: torch sees its two dies apart), "
        "https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html",
    ),
    "mi300x": Device(
        names=("AMD Instinct MI300X",),
        peak=_peak(163.4, 653.7, 1307.4, 2614.9),
        memory_bytes=192 * GIGA,
        memory_bytes_per_second=5300 * GIGA,
        link_bytes_per_second=448 * GIGA,
        source="AMD Instinct MI300X data sheet, "
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
}
"""Accelerators by the short name that `disttrain plan --device` takes."""


def lookup(device_name: str) -> Device | None:
    """The device of that name (torch's, or the table's short one), exact but for letter case; None when unknown.

    A slice of a device ("... MIG 1g.5gb") and a variant that is not in the table are unknown.
    """
    wanted = device_name.strip().casefold()
    for prefix in ("nvidia ", "tesla "):
        wanted = wanted.removeprefix(prefix)
    for short_name, device in DEVICES.items():
        if wanted == short_name or wanted in (name.casefold() for name in device.names):
            return device
    return None


def peak_flops(device_name: str, dtype: str) -> tuple[float, str] | None:
    """Dense peak FLOP/s of one device for fp32, tf32, bf16, fp16 or fp8, and its source; None when unknown."""
    device = lookup(device_name)
    if device is None or dtype not in device.peak:
        return None
    return device.peak[dtype], device.source


def gpu_name(gpus: Path = GPUS) -> str | None:
    """Name of this machine's first NVIDIA GPU, as its driver says without torch; None without one."""
    for path in sorted(gpus.glob("*/information")):
        name = _cpuinfo(path, "Model")
        if name:
            return name
    return None


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Instruction-set flags of this CPU (avx512_bf16, amx_bf16, ...), as Linux lists them; empty elsewhere."""
    for key in ("flags", "Features"):  # x86, Arm
        value = _cpuinfo(cpuinfo, key)
        if value is not None:
            return frozenset(value.split())
    return frozenset()


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Model name of this CPU, or its architecture where Linux does not say."""
    return _cpuinfo(cpuinfo, "model name") or platform.processor() or platform.machine()


def _cpuinfo(path: Path, key: str) -> str | None:
    try:
        text = path.read_text()
    except OSError:
        return None  # not Linux
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
