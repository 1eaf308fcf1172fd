"""What the makers of accelerators promise: one table, by the name that torch gives a device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of accelerator."""

    name: str
    bf16_flops: float
    """Dense bf16 matrix products with fp32 sums, in operations per second (data sheets; half of
    figures that count sparsity)."""


DEVICES = {
    "GB200": Device("GB200", 2500e12),
    "B200": Device("B200", 2250e12),
    "GH200": Device("GH200", 989e12),
    "H200 NVL": Device("H200 NVL", 835e12),
    "H200": Device("H200 SXM", 989e12),
    "H100 NVL": Device("H100 NVL", 835e12),
    "H100 PCIe": Device("H100 PCIe", 756e12),
    "H100": Device("H100 SXM", 989e12),
    "H800": Device("H800 SXM", 989e12),
    "H20": Device("H20", 148e12),
    "A100": Device("A100", 312e12),
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
    "MI300X": Device("MI300X", 1307.4e12),
    "MI250X": Device("MI250X", 383e12),
}
"""By words of the name that torch gives, the more exact ones first."""


def find_device(name: str) -> Device | None:
    """The device that ``torch.cuda.get_device_name()`` calls ``name``; None when it is not in the
    table."""
    words = _words(name)
    for key, device in DEVICES.items():
        if set(key.split()) <= words:
            return device
    return None


def _words(name: str) -> set[str]:
    return set(name.replace("-", " ").replace("_", " ").split())


def peak_flops(name: str) -> float | None:
    """Dense bf16 operations per second at most; None when the device is not known."""
    device = find_device(name)
    return None if device is None else device.bf16_flops
