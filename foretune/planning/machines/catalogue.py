"""Accelerators by name: usable memory, dense 16-bit peak, memory bandwidth, link to its neighbours.

Memory is what a process sees as the device's total (less than the number on the box: firmware and ECC take theirs).
Peaks are dense, without sparsity, from the vendors' data sheets; how much of one is reached,
`foretune.planning.predict.timing` says. Links are bytes per second in one direction per device.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
_NVLINK_3, _NVLINK_4, _NVLINK_5 = 300e9, 450e9, 900e9
_PCIE_3, _PCIE_4, _PCIE_5 = 12e9, 25e9, 50e9  # x16, as NCCL reaches it


@dataclass(frozen=True)
class Card:
    """One kind of accelerator. `peak_flops` is of the best dense 16-bit format with fp32 accumulation."""

    name: str
    memory_gib: float
    peak_tflops: float
    bandwidth_gb: float
    link: float
    bf16: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def host_link(self) -> float:
        """Bytes per second each way to the host as pinned copies reach them: PCIe 5 from Hopper on, else 4 or 3."""
        newest = self.bandwidth_gb >= 3000 or self.link in (_PCIE_5, _NVLINK_4, _NVLINK_5)
        return 45e9 if newest else 11e9 if not self.bf16 else 22e9

    @property
    def watts(self) -> float:
        """Board power by the data sheet."""
        return WATTS[self.name]

    @property
    def network(self) -> float:
        """Bytes per second a card adds to its machine's network where nothing is said, as such machines are sold.

        400 Gbit/s a card beside NVLink 4 and 5, 200 beside NVLink 3; other machines have one port of 100 Gbit/s.
        """
        return {_NVLINK_5: 50e9, _NVLINK_4: 50e9, _NVLINK_3: 25e9}.get(self.link, 0.0)

    @property
    def memory_bytes(self) -> int:
        """Usable device memory in bytes."""
        return int(self.memory_gib * GIB)


# fmt: off
#: Name as the hardware SPEC writes it; `aliases` are pieces of nvidia-smi's names and short forms people type.
CARDS: tuple[Card, ...] = (
    Card("B300-288GB", 267.0, 2250, 8000, _NVLINK_5, aliases=("b300",)),
    Card("B200-192GB", 178.3, 2250, 8000, _NVLINK_5, aliases=("b200", "b200-180gb")),
    Card("GB200-192GB", 184.0, 2500, 8000, _NVLINK_5, aliases=("gb200",)),
    Card("GH200-96GB", 94.5, 989, 4000, _NVLINK_4, aliases=("gh200",)),
    Card("H200-141GB", 139.8, 989, 4800, _NVLINK_4, aliases=("h200",)),
    Card("H100-80GB", 79.1, 989, 3350, _NVLINK_4, aliases=("h100", "h100-sxm")),
    Card("H100-NVL-94GB", 93.1, 835, 3900, _PCIE_5, aliases=("h100-nvl",)),
    Card("H100-PCIE-80GB", 79.1, 756, 2000, _PCIE_5, aliases=("h100-pcie",)),
    Card("H800-80GB", 79.1, 989, 3350, 200e9, aliases=("h800",)),
    Card("H20-96GB", 95.0, 148, 4000, _NVLINK_4, aliases=("h20",)),
    Card("A100-80GB", 79.1, 312, 2039, _NVLINK_3, aliases=("a100", "a100-sxm4-80gb")),
    Card("A100-PCIE-80GB", 79.1, 312, 1935, _PCIE_4, aliases=("a100-pcie", "a100 80gb pcie")),
    Card("A100-40GB", 39.4, 312, 1555, _NVLINK_3, aliases=("a100-sxm4-40gb", "a100-pcie-40gb")),
    Card("A800-80GB", 79.1, 312, 2039, 200e9, aliases=("a800",)),
    Card("A30-24GB", 23.6, 165, 933, _PCIE_4, aliases=("a30",)),
    Card("A40-48GB", 44.4, 149.7, 696, _PCIE_4, aliases=("a40",)),
    Card("A10-24GB", 22.1, 125, 600, _PCIE_4, aliases=("a10",)),
    Card("A10G-24GB", 22.1, 70, 600, _PCIE_4, aliases=("a10g",)),
    Card("L40S-48GB", 44.4, 362, 864, _PCIE_4, aliases=("l40s",)),
    Card("L40-48GB", 44.4, 181, 864, _PCIE_4, aliases=("l40",)),
    Card("L4-24GB", 22.1, 121, 300, _PCIE_4, aliases=("l4",)),
    Card("RTXPRO6000-96GB", 94.9, 503, 1792, _PCIE_5, aliases=("rtx pro 6000", "rtxpro6000")),
    Card("RTX6000ADA-48GB", 47.5, 364, 960, _PCIE_4, aliases=("rtx 6000 ada", "rtx6000ada")),
    Card("RTXA6000-48GB", 47.5, 154.8, 768, _PCIE_4, aliases=("rtx a6000", "a6000", "rtxa6000")),
    Card("RTXA5000-24GB", 23.6, 111, 768, _PCIE_4, aliases=("rtx a5000", "a5000", "rtxa5000")),
    Card("RTX5090-32GB", 31.3, 209.5, 1792, _PCIE_5, aliases=("rtx5090", "rtx 5090")),
    Card("RTX5080-16GB", 15.5, 112.6, 960, _PCIE_5, aliases=("rtx5080", "rtx 5080")),
    Card("RTX4090-24GB", 23.6, 165.2, 1008, _PCIE_4, aliases=("rtx4090", "rtx 4090")),
    Card("RTX4080-16GB", 15.6, 97.5, 717, _PCIE_4, aliases=("rtx4080", "rtx 4080")),
    Card("RTX4060TI-16GB", 15.6, 44, 288, _PCIE_4, aliases=("rtx4060ti", "rtx 4060 ti")),
    Card("RTX3090-24GB", 23.6, 71, 936, _PCIE_4, aliases=("rtx3090", "rtx 3090")),
    Card("RTX3080-10GB", 9.6, 59.5, 760, _PCIE_4, aliases=("rtx3080", "rtx 3080")),
    Card("RTX3060-12GB", 11.6, 25.3, 360, _PCIE_4, aliases=("rtx3060", "rtx 3060")),
    Card("RTX2080TI-11GB", 10.6, 53.8, 616, _PCIE_3, bf16=False, aliases=("rtx2080ti", "rtx 2080 ti")),
    Card("T4-16GB", 14.6, 65, 320, _PCIE_3, bf16=False, aliases=("t4",)),
    Card("V100-32GB", 31.7, 125, 900, 150e9, bf16=False, aliases=("v100", "v100-sxm2-32gb")),
    Card("V100-16GB", 15.8, 125, 900, 150e9, bf16=False, aliases=("v100-sxm2-16gb", "v100-pcie-16gb")),
)
# fmt: on

# fmt: off
#: Board power in watts, from the data sheets; of a configurable one the usual setting.
WATTS: dict[str, float] = {
    "B300-288GB": 1400, "B200-192GB": 1000, "GB200-192GB": 1200, "GH200-96GB": 700, "H200-141GB": 700,
    "H100-80GB": 700, "H100-NVL-94GB": 400, "H100-PCIE-80GB": 350, "H800-80GB": 700, "H20-96GB": 400,
    "A100-80GB": 400, "A100-PCIE-80GB": 300, "A100-40GB": 400, "A800-80GB": 400, "A30-24GB": 165, "A40-48GB": 300,
    "A10-24GB": 150, "A10G-24GB": 300, "L40S-48GB": 350, "L40-48GB": 300, "L4-24GB": 72, "RTXPRO6000-96GB": 600,
    "RTX6000ADA-48GB": 300, "RTXA6000-48GB": 300, "RTXA5000-24GB": 230, "RTX5090-32GB": 575, "RTX5080-16GB": 360,
    "RTX4090-24GB": 450, "RTX4080-16GB": 320, "RTX4060TI-16GB": 165, "RTX3090-24GB": 350, "RTX3080-10GB": 320,
    "RTX3060-12GB": 170, "RTX2080TI-11GB": 250, "T4-16GB": 70, "V100-32GB": 300, "V100-16GB": 300,
}
# fmt: on

#: Beginnings of the names of cards with 8-bit matrix units: Ada, Hopper, Blackwell.
_FP8 = ("H", "GH", "B", "GB", "L4", "RTX40", "RTX50", "RTX6000ADA", "RTXPRO")


#: The same of Hopper.
_HOPPER = ("H", "GH")
#: The same of Hopper and data-centre Blackwell, for which FlashAttention-4 is written.
_FLASH_ATTENTION_4 = ("H", "GH", "B", "GB")


def has_flash_attention_4(name: str) -> bool:
    """Whether FlashAttention-4 has kernels for a card of the catalogue."""
    return find_card(name) is not None and name.startswith(_FLASH_ATTENTION_4)


def is_hopper(name: str) -> bool:
    """Whether a card of the catalogue is one of capability 9."""
    return find_card(name) is not None and name.startswith(_HOPPER)


def has_fp8(name: str) -> bool:
    """Whether a card of the catalogue multiplies 8-bit floats."""
    return find_card(name) is not None and name.startswith(_FP8)


#: Of a CPU core, fp32: 16 lanes times multiply and add at about 2.5 GHz, the rate a well-kept matmul sustains.
CPU_CORE_FLOPS = 80e9
CPU_BANDWIDTH = 20e9  # bytes per second of one socket that one or two cores can draw
CPU_LINK = 1.5e9  # gloo between processes of one machine, bytes per second
DEFAULT_NETWORK = 100e9 / 8  # between machines when nothing is said: 100 Gbit/s
HOST_MEMORY_PER_CARD = 128 * GIB  # of a described node when nothing is said
CORES_PER_CARD = 16
DISK = 3e9  # bytes per second of one NVMe disk, for what is offloaded to it
HOST_MEMORY_PER_CPU_RANK = 8 * GIB


def normalised(name: str) -> str:
    """A name without what people write differently: case, spaces, dashes, the vendor."""
    name = name.lower().replace("nvidia", "").replace("geforce", "").replace("graphics", "")
    return "".join(character for character in name if character.isalnum())


def find_card(name: str) -> Card | None:
    """The card that a SPEC or nvidia-smi names; None if the catalogue has none."""
    wanted = normalised(name)
    for card in CARDS:
        if wanted == normalised(card.name) or wanted in {normalised(alias) for alias in card.aliases}:
            return card
    return None
