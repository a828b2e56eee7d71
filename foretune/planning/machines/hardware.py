"""The machines: probed (nvidia-smi, /proc, cgroups) or described ("2x8xA100-40GB,ram=512GB"). Out: a `Cluster`.

A CPU machine has ranks too: each gets an equal share of the memory that may be used and of the cores.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from pathlib import Path

import psutil

from foretune.artifacts import Accelerator, Cluster
from foretune.errors import UserError
from foretune.planning.machines import catalogue
from foretune.planning.machines.catalogue import CARDS, GIB, Card, find_card, normalised

#: Ranks on a machine without a GPU when nobody says how many; see `default_cpu_ranks`.
MOST_CPU_RANKS = 2

#: (limit, usage) of a container's memory, in cgroups version 2 and 1.
CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)

_FORM = (
    "write for example 8xH100-80GB, 2x8xA100-40GB, 1xRTX4090 or 4xcpu, with ,ram=512GB,link=nvlink,net=400Gbps if known"
)


def probe(nproc: int | None = None) -> Cluster:
    """Look at this machine.

    Args:
        nproc: ranks to plan for; None is one per GPU, or `default_cpu_ranks` where there is none.

    Raises:
        UserError: (field ``--nproc``) more ranks than GPUs, or fewer than one.
    """
    if nproc is not None and nproc < 1:
        raise UserError("--nproc", nproc, "is not a number of ranks", "give 1 or more")
    cards = _visible_gpus()
    host, cores = usable_host_memory(), usable_cores()
    if not cards:
        ranks = nproc or default_cpu_ranks(cores)
        return _cpu_cluster(ranks, nodes=1, host=host, cores=cores, network=catalogue.DEFAULT_NETWORK, probed=True)
    if nproc is not None and nproc > len(cards):
        raise UserError("--nproc", nproc, f"this machine has {len(cards)} GPU(s)", f"give at most {len(cards)}")
    used = cards[: nproc or len(cards)]
    link, host_link = min(_links_of(card.name) for card in used)
    return Cluster(
        accelerator=_weakest(used),
        nodes=1,
        devices_per_node=len(used),
        host_memory_bytes=host,
        cores_per_node=cores,
        link_bandwidth=link,
        network_bandwidth=catalogue.DEFAULT_NETWORK,
        host_link_bandwidth=host_link,
        notes=_oddities(used),
        probed=True,
    )


def parse_hardware(spec: str, nproc: int | None = None) -> Cluster:
    """Read ``[NODESx]DEVICESxNAME[,ram=SIZE][,link=RATE][,net=RATE][,cores=N][,disk=RATE][,price=P]``, or ``auto``.

    ``price`` is of one device and hour, in any currency; with it, energy and cost are predicted. ``auto`` takes it too.

    Raises:
        UserError: (field ``--hardware``) not of that form, or an accelerator that nobody knows (with the nearest name).
    """
    head, *options = [piece.strip() for piece in spec.split(",")]
    if head.lower() == "auto":
        given = _options(spec, options)
        if set(given) - {"price"}:
            raise UserError("--hardware", spec, "what is probed cannot be described too", "give price alone, or all")
        return _with_options(probe(nproc), given)
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(?:(\d+)\s*[x×*]\s*)?(\S.*)", head, re.IGNORECASE)
    if match is None or not head:
        raise UserError("--hardware", spec, "is not a description of hardware", _FORM)
    first, second, name = match.groups()
    nodes, devices = (int(first), int(second)) if first and second else (1, int(first or 1))
    if nodes < 1 or devices < 1 or nodes * devices > 100_000:
        raise UserError("--hardware", spec, "has no sensible number of devices", _FORM)
    given = _options(spec, options)
    if normalised(name) == "cpu":
        cores = int(given.get("cores", devices))
        host = int(given.get("ram", catalogue.HOST_MEMORY_PER_CPU_RANK * devices))
        network = given.get("net", catalogue.DEFAULT_NETWORK)
        cluster = _cpu_cluster(devices, nodes=nodes, host=host, cores=cores, network=network, probed=False)
        return _with_options(cluster.model_copy(update={"notes": _assumptions(given, cluster)}), given)
    card = find_card(name)
    if card is None:
        raise UserError(
            "--hardware", spec, f"there is no accelerator named {name} in the catalogue", _nearest_card(name)
        )
    cluster = Cluster(
        accelerator=_accelerator(card),
        nodes=nodes,
        devices_per_node=devices,
        host_memory_bytes=int(given.get("ram", catalogue.HOST_MEMORY_PER_CARD * devices)),
        cores_per_node=int(given.get("cores", catalogue.CORES_PER_CARD * devices)),
        link_bandwidth=given.get("link", card.link),
        network_bandwidth=given.get("net", max(catalogue.DEFAULT_NETWORK, card.network * devices)),
        host_link_bandwidth=card.host_link,
        probed=False,
    )
    return _with_options(cluster.model_copy(update={"notes": _assumptions(given, cluster)}), given)


def _with_options(cluster: Cluster, given: dict[str, float]) -> Cluster:
    return cluster.model_copy(
        update={"disk_bandwidth": given.get("disk", catalogue.DISK), "price_per_hour": given.get("price")}
    )


def _assumptions(given: dict[str, float], cluster: Cluster) -> list[str]:
    """What a description left out and was filled in."""
    ram = f"{cluster.host_memory_bytes / GIB:.0f} GB"
    network = f"{cluster.network_bandwidth * 8 / 1e9:.0f} Gbps"
    filled = {"ram": f"{ram} of host memory a machine (ram={ram.replace(' ', '')})"}
    if cluster.accelerator.kind == "cuda":
        filled["cores"] = f"{cluster.cores_per_node} cores a machine (cores={cluster.cores_per_node})"
    if cluster.nodes > 1:
        filled["net"] = f"{network} between machines (net={network.replace(' ', '')})"
    said = [text for key, text in filled.items() if key not in given]
    return [f"assumed: {', '.join(said)}"] if said else []


def _weakest(cards: list[Accelerator]) -> Accelerator:
    """A device that promises no more than any of these; all ranks do the same work, so the weakest sets the pace."""
    smallest = min(cards, key=lambda card: card.memory_bytes)
    return smallest.model_copy(
        update={
            "bf16": all(card.bf16 for card in cards),
            "peak_flops": min(card.peak_flops for card in cards),
            "memory_bandwidth": min(card.memory_bandwidth for card in cards),
        }
    )


def _oddities(cards: list[Accelerator]) -> list[str]:
    names = sorted({card.name for card in cards})
    return [f"different GPUs ({', '.join(names)}): planned for the weakest of each property"] if len(names) > 1 else []


def default_cpu_ranks(cores: int) -> int:
    """Ranks on a machine without a GPU: two where there are two cores.

    More ranks than that only multiply the fp32 weights of every rank, while each keeps fewer cores for its matmuls.
    """
    return min(MOST_CPU_RANKS, cores)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_host_memory() -> int:
    """Bytes that new processes can take here: what the kernel calls available, or less where a container says so."""
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in CGROUP_FILES:
        limit, usage = _read_number(limit_file), _read_number(usage_file)
        if limit is not None and usage is not None:  # version 1 writes a huge number for "no limit", which is harmless
            available = min(available, max(0, limit - usage + _reclaimable(limit_file.parent)))
    return available


def _reclaimable(folder: Path) -> int:
    """Page cache of a cgroup that the kernel gives back when asked; it counts as used but is not in the way."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text().strip())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _cpu_cluster(ranks: int, *, nodes: int, host: int, cores: int, network: float, probed: bool) -> Cluster:
    share = max(1, cores // ranks)
    accelerator = Accelerator(
        name="cpu",
        kind="cpu",
        memory_bytes=host // ranks,
        bf16=probed and _cpu_has_bf16(),
        fp16=False,
        peak_flops=catalogue.CPU_CORE_FLOPS * share,
        memory_bandwidth=catalogue.CPU_BANDWIDTH / min(ranks, 2),
    )
    return Cluster(
        accelerator=accelerator,
        nodes=nodes,
        devices_per_node=ranks,
        host_memory_bytes=host,
        cores_per_node=cores,
        link_bandwidth=catalogue.CPU_LINK,
        network_bandwidth=min(network, catalogue.CPU_LINK),
        probed=probed,
    )


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX-512 BF16 or AMX); without, bf16 is emulated and slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _accelerator(card: Card, memory_bytes: int | None = None) -> Accelerator:
    return Accelerator(
        name=card.name,
        kind="cuda",
        memory_bytes=memory_bytes or card.memory_bytes,
        bf16=card.bf16,
        fp16=True,
        peak_flops=card.peak_tflops * 1e12,
        memory_bandwidth=card.bandwidth_gb * 1e9,
        watts=card.watts,
    )


def _visible_gpus() -> list[Accelerator]:
    """GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves visible (nvidia-smi itself ignores that mask)."""
    query = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.reserved,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines() if line.count(",") >= 5]
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        wanted = [piece.strip() for piece in mask.split(",") if piece.strip()]
        rows = [row for piece in wanted for row in rows if row[0] == piece or row[1].startswith(piece)]
    return [_from_row(row) for row in rows]


def _from_row(row: list[str]) -> Accelerator:
    """One line of nvidia-smi. Of a card that the catalogue lacks, the speed is guessed modestly, never the memory."""
    name, total_mib = row[2], float(row[3])
    reserved_mib = float(row[4]) if row[4].replace(".", "").isdigit() else 0.0
    memory = int((total_mib - reserved_mib) * 2**20)
    capability = float(row[5]) if row[5].replace(".", "").isdigit() else 8.0
    card = _nvidia_card(name, memory)
    if card is not None:
        return _accelerator(card, memory)
    return Accelerator(
        name=name,
        kind="cuda",
        memory_bytes=memory,
        bf16=capability >= 8.0,
        fp16=True,
        peak_flops=60e12,
        memory_bandwidth=500e9,
    )


def _nvidia_card(name: str, memory_bytes: int) -> Card | None:
    """The catalogue's card for a name like "NVIDIA A100-SXM4-80GB": the longest alias it holds, nearest in memory."""
    wanted = normalised(name)
    fits = [
        (len(key), -abs(card.memory_bytes - memory_bytes), card)
        for card in CARDS
        for key in (normalised(alias) for alias in (card.name, *card.aliases))
        if key in wanted and abs(card.memory_bytes - memory_bytes) < 0.2 * memory_bytes
    ]
    return max(fits, key=lambda fit: fit[:2])[2] if fits else None


def _links_of(name: str) -> tuple[float, float]:
    """Bytes per second to the neighbour and to the host; a card that nobody knows is taken to sit on PCIe 3."""
    card = find_card(name)
    return (card.link, card.host_link) if card is not None else (12e9, 11e9)


def _options(spec: str, options: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for option in options:
        key, _, text = option.partition("=")
        key = key.strip().lower()
        if key not in _UNITS:
            raise UserError("--hardware", spec, f"there is no option {key!r}", f"the options are {', '.join(_UNITS)}")
        values[key] = _quantity(spec, key, text.strip().lower())
    return values


_UNITS: dict[str, dict[str, float]] = {
    "ram": {"gb": GIB, "gib": GIB, "tb": 1024 * GIB, "tib": 1024 * GIB, "": GIB},
    "net": {"gbps": 1e9 / 8, "gbit/s": 1e9 / 8, "gb/s": 1e9, "": 1e9 / 8},
    "link": {"gb/s": 1e9, "gbps": 1e9 / 8, "": 1e9},
    "cores": {"": 1.0},
    "disk": {"gb/s": 1e9, "mb/s": 1e6, "": 1e9},
    "price": {"": 1.0},
}


def _quantity(spec: str, key: str, text: str) -> float:
    if key == "link" and text in ("nvlink", "pcie"):
        return 300e9 if text == "nvlink" else 25e9
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z/]*)", text)
    if match is None or match.group(2) not in _UNITS[key] or float(match.group(1)) <= 0:
        raise UserError("--hardware", spec, f"{key}={text} is no quantity", _FORM)
    return float(match.group(1)) * _UNITS[key][match.group(2)]


def _nearest_card(name: str) -> str:
    names = {normalised(alias): card.name for card in CARDS for alias in (card.name, *card.aliases)}
    near = difflib.get_close_matches(normalised(name), names, n=1, cutoff=0.3)
    known = f"did you mean {names[near[0]]}? " if near else ""
    return f"{known}known are cpu, {', '.join(card.name for card in CARDS)}"
