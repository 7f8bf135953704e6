"""What devices can do at most, by their makers' data sheets: the floor of a time.

The peaks are of dense bfloat16 products with float32 sums, and of reading memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """The peaks of a device.

    Attributes:
        name: as in the documents.
        bandwidth: of memory, in bytes a second.
        flops: of dense bfloat16 products, a second.
        source: where the two are printed.
    """

    name: str
    bandwidth: float
    flops: float
    source: str

    def floor_us(self, moved_bytes: float, flops: float = 0.0) -> float:
        """The least microseconds in which so much is moved and computed, if both overlap wholly."""
        return 1e6 * max(moved_bytes / self.bandwidth, flops / self.flops)


# With the word that tells it in the name that the driver gives. SXM; PCIe cards are slower.
DEVICES = {
    "H200": Device("H200", 4.8e12, 989e12, "NVIDIA H200 Tensor Core GPU, data sheet"),
    "H100": Device("H100 SXM", 3.35e12, 989e12, "NVIDIA H100 Tensor Core GPU, data sheet"),
    "A100": Device("A100 80GB SXM", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU, data sheet"),
}


def device_of(name: str) -> Device | None:
    """The peaks of the device whose driver gives this name, if they are known."""
    return next((device for word, device in DEVICES.items() if word in name), None)
