"""Data sheet figures of accelerators, in one table by the device name of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """Memory and links of one accelerator in the maker's own server of eight."""

    memory: float
    """Device memory, bytes."""
    memory_bandwidth: float
    """Bandwidth of the device memory, bytes per second."""
    fp32_flops: float
    """Peak rate of fp32 matrix products without TF32, FLOP/s."""
    inside: float
    """Bandwidth from one accelerator to others in its node, bytes per second: half the figure of
    data sheets, which counts both directions."""
    outside: float
    """Bandwidth of the network card of one accelerator, bytes per second."""
    price: float | None
    """On-demand price, dollars per hour; None where no price list was found."""


@dataclass(frozen=True)
class Device:
    """One kind of accelerator."""

    name: str
    bf16_flops: float
    """Peak rate of dense bf16 matrix products with fp32 accumulation, FLOP/s (data sheets; half of
    figures that count sparsity)."""
    node: Node | None = None
    """Memory, links and price, for forecasts; None where they were not looked up."""


# Memory, bandwidths and fp32: data sheets of NVIDIA A100 80GB, H100, H200, HGX B200 (SXM) and AMD
# Instinct MI300X. Network: DGX A100 has 8 cards of 200 Gb/s, DGX H100, H200 and B200 8 of 400 Gb/s;
# servers of MI300X are sold with 8 of 400 Gb/s. Prices: the middle of what specialised providers
# list for one hour (mercatus-ai.com/blog/cloud-gpu-pricing, May 2026).
A100_NODE = Node(80e9, 2.039e12, 19.5e12, 300e9, 25e9, 1.30)
H100_NODE = Node(80e9, 3.35e12, 67e12, 450e9, 50e9, 3.00)
H200_NODE = Node(141e9, 4.8e12, 67e12, 450e9, 50e9, 4.00)
B200_NODE = Node(180e9, 8e12, 75e12, 900e9, 50e9, None)
MI300X_NODE = Node(192e9, 5.3e12, 163.4e12, 448e9, 50e9, None)

DEVICES = {
    "GB200": Device("GB200", 2500e12),
    "B200": Device("B200", 2250e12, B200_NODE),
    "GH200": Device("GH200", 989e12),
    "H200 NVL": Device("H200 NVL", 835e12),
    "H200": Device("H200 SXM", 989e12, H200_NODE),
    "H100 NVL": Device("H100 NVL", 835e12),
    "H100 PCIe": Device("H100 PCIe", 756e12),
    "H100": Device("H100 SXM", 989e12, H100_NODE),
    "H800": Device("H800 SXM", 989e12),
    "H20": Device("H20", 148e12),
    "A100": Device("A100", 312e12, A100_NODE),
    "A800": Device("A800", 312e12),
    "A40": Device("A40", 149.7e12),
    "A30": Device("A30", 165e12),
    "A10G": Device("A10G", 70e12),
    "A10": Device("A10", 125e12),
    "RTX A6000": Device("RTX A6000", 154.8e12),
    "RTX 6000 Ada": Device("RTX 6000 Ada", 364e12),
    "L40S": Device("L40S", 362e12),
    "L40": Device("L40", 181e12),
    "L4": Device("L4", 121e12),
    "RTX 4090": Device("RTX 4090", 165.2e12),
    "RTX 3090": Device("RTX 3090", 71e12),
    "MI300X": Device("MI300X", 1307.4e12, MI300X_NODE),
    "MI250X": Device("MI250X", 383e12),
}
"""Devices by words of the device name of torch; more specific names come first."""


def find_device(name: str) -> Device | None:
    """Return the device that ``torch.cuda.get_device_name()`` calls ``name``; None if it is not in
    the table."""
    words = _words(name)
    for key, device in DEVICES.items():
        if set(key.split()) <= words:
            return device
    return None


def _words(name: str) -> set[str]:
    return set(name.replace("-", " ").replace("_", " ").split())


def peak_flops(name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of a device; None if the device is unknown."""
    device = find_device(name)
    return None if device is None else device.bf16_flops


def planned_device(name: str) -> tuple[Device, Node]:
    """Return the device of ``--gpu``, in any case. Raises ValueError for an unknown name."""
    for key, device in DEVICES.items():
        if device.node is not None and key.lower() == name.lower():
            return device, device.node
    known = ", ".join(sorted(key.lower() for key, each in DEVICES.items() if each.node))
    raise ValueError(f"--gpu: expected one of {known}, given {name!r}")
