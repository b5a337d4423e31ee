from pathlib import Path

import pytest

from disttrain.hardware import DEVICES, cpu_flags, cpu_name, lookup, peak_flops


@pytest.mark.parametrize(
    "name, short_name",
    [
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla V100-SXM2-16GB", "v100-sxm"),
        ("Tesla V100-PCIE-32GB", "v100-pcie-32gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("AMD Instinct MI250X", "mi250x"),
        ("AMD Instinct MI300X", "mi300x"),
        ("h100-sxm", "h100-sxm"),
    ],
)
def test_torch_names_are_known(name: str, short_name: str):
    assert lookup(name) is DEVICES[short_name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA",
        "NVIDIA H100",  # which of them?
        "NVIDIA A100",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "AMD Instinct MI250X / MI250",
        "NVIDIA GH200 480GB",
        "AMD EPYC",
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
    ],
)
def test_nothing_is_guessed(name: str):
    assert lookup(name) is None
    assert peak_flops(name, "bf16") is None


def test_peaks_are_dense_and_carry_a_source():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == (989.5e12, DEVICES["h100-sxm"].source)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == (312e12, DEVICES["a100-sxm-80gb"].source)
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None  # fp16 only
    assert peak_flops("NVIDIA H200", "fp64") is None


@pytest.mark.parametrize("name", DEVICES)
def test_rows_are_plausible(name: str):
    """Slips of a digit or a unit: bytes and FLOP per second, vendors' addresses, peaks that rise as types narrow."""
    device = DEVICES[name]
    assert (
        "https://www.nvidia.com/" in device.source
        or "https://images.nvidia.com/" in device.source
        or ("https://www.amd.com/" in device.source)
    )
    assert set(device.peak) <= {"fp32", "tf32", "bf16", "fp16", "fp8"} and {"fp32", "fp16"} <= set(device.peak)
    rising = [device.peak[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8") if dtype in device.peak]
    assert rising == sorted(rising) and rising[0] > 5e12 and rising[-1] < 1e16
    assert device.peak.get("bf16", device.peak["fp16"]) == device.peak["fp16"]
    assert 16e9 <= device.memory_bytes <= 200e9
    assert 3e11 <= device.memory_bytes_per_second <= 8e12
    assert 16e9 <= device.link_bytes_per_second <= 900e9


def test_cpu_flags_and_name(tmp_path: Path):
    x86 = tmp_path / "x86"
    x86.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nprocessor\t: 1\n")
    assert cpu_flags(x86) == {"fpu", "avx512_bf16", "amx_bf16"}
    assert cpu_name(x86) == "Some CPU"
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu_flags(arm) == {"fp", "asimd", "bf16"}
    missing = tmp_path / "missing"
    assert cpu_flags(missing) == frozenset()
    assert cpu_name(missing)


def test_no_name_belongs_to_two_devices():
    for short_name, device in DEVICES.items():
        assert lookup(short_name) is device
        for name in device.names:
            assert lookup(name) is device
