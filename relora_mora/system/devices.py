"""The accelerators that the planner knows, from their vendors' data sheets."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator; 0 means unknown.

    ``node_gbits`` is one device's share of the network between hosts, for the host type in ``host``. ``--link_gbits``
    overrides it in a plan, for a whole host.
    """

    name: str
    in_name: str  # whole words in torch.cuda.get_device_name()
    tflops: float  # dense bf16 matrix products
    memory_gb: float  # 1e9 bytes
    memory_gbytes_per_s: float
    peer_gbytes_per_s: float  # to the other devices of a host, one direction
    node_gbits: float
    source: str
    host: str

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability of a GPU, as far as products in 8 bits depend on it."""
        return (8, 0) if self.name in WITHOUT_FP8 else (8, 9)


# x16, one direction
_PCIE4 = 32.0
_PCIE5 = 64.0
# A name that contains another one comes first. NVIDIA states NVLink's rate for both directions; this table has half.
# The white papers of RTX cards are read for products with fp32 sums. The RTX 3060's 101 are sparse, with fp16 sums.
DEVICES = (
    Device("b200", "B200", 2250, 180, 8000, 900, 400, "NVIDIA DGX data sheet, an eighth", "DGX B200: 8 x 400 Gbit/s"),
    Device("h200", "H200", 989, 141, 4800, 450, 400, "NVIDIA data sheet, SXM", "DGX H200: 8 x 400 Gbit/s"),
    Device("h100-pcie", "H100 PCIe", 756, 80, 2000, _PCIE5, 200, "NVIDIA data sheet", "200 Gbit/s a device, assumed"),
    Device("h100", "H100", 989, 80, 3350, 450, 400, "NVIDIA data sheet, SXM", "DGX H100: 8 x 400 Gbit/s"),
    Device("a100-40gb", "A100-SXM4-40GB", 312, 40, 1555, 300, 200, "NVIDIA data sheet", "DGX A100: 8 x 200 Gbit/s"),
    Device("a100-80gb", "A100", 312, 80, 2039, 300, 200, "NVIDIA data sheet, SXM", "DGX A100: 8 x 200 Gbit/s"),
    Device("l40s", "L40S", 362, 48, 864, _PCIE4, 50, "NVIDIA data sheet", "50 Gbit/s a device, assumed"),
    Device("l4", "L4", 121, 24, 300, _PCIE4, 12.5, "NVIDIA data sheet", "GCP g2-standard-96: 100 Gbit/s for 8"),
    Device("a10g", "A10G", 70, 24, 600, _PCIE4, 12.5, "NVIDIA data sheet (AWS)", "AWS g5.48xlarge: 100 Gbit/s for 8"),
    Device("rtx4090", "RTX 4090", 165, 24, 1008, _PCIE4, 2.5, "NVIDIA Ada white paper", "10 Gbit/s for 4, assumed"),
    Device("rtx4080", "RTX 4080", 97, 16, 717, _PCIE4, 2.5, "NVIDIA Ada white paper", "10 Gbit/s for 4, assumed"),
    Device("rtx3090", "RTX 3090", 71, 24, 936, _PCIE4, 2.5, "NVIDIA GA102 white paper", "10 Gbit/s for 4, assumed"),
    Device("rtx3060", "RTX 3060", 25, 12, 360, _PCIE4, 2.5, "NVIDIA: 101 / 4", "10 Gbit/s for 4, assumed"),
)
WITHOUT_FP8 = ("a100-40gb", "a100-80gb", "a10g", "rtx3090", "rtx3060")  # compute capabilities of 8.0 and 8.6
_ALIASES = {
    "a100": "a100-80gb",
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "4090": "rtx4090",
    "4080": "rtx4080",
    "3090": "rtx3090",
    "3060": "rtx3060",
    "cuda": "a100-80gb",  # what a plan for CUDA assumes on a machine without it
}
CPU = Device("cpu", "", 0, 0, 0, 0, 0, "", "")
_OTHER_CARD = r"(?! (?:NVL|Ti|D|SUPER|Laptop)\b)"  # cards with the same first words but a data sheet of their own


def named_device(name: str) -> Device:
    """The device for a user's spelling, such as ``4090``, ``RTX 4090`` or ``NVIDIA GeForce RTX 4090``.

    Raises ValueError, which lists the known names.
    """
    names = {device.name: device for device in (*DEVICES, CPU)}
    names |= {alias: names[device_name] for alias, device_name in _ALIASES.items()}
    by_letters = {_letters(known): device for known, device in names.items()}
    device = by_letters.get(_letters(name).removeprefix("nvidia").removeprefix("geforce"))
    if device is None:
        known = ", ".join(sorted(names.keys() - {"cuda", "cpu"}, key=lambda name: (name[0].isdigit(), name)))
        raise ValueError(
            f"--device: got {name!r}, expected cuda, cpu or one of {known}; "
            "for another device, give the most similar one of these, and the peak as --log.peak_tflops"
        )
    return device


def _letters(name: str) -> str:
    """Lower-case letters and digits only, because people write names with and without spaces and hyphens."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def device_of_name(cuda_name: str) -> Device | None:
    """The device for a name that CUDA reports; None if it is unknown or only a part of a GPU (MIG)."""
    if " MIG " in cuda_name:
        return None
    return next((device for device in DEVICES if re.search(rf"\b{device.in_name}\b{_OTHER_CARD}", cuda_name)), None)
