"""Descriptions of machines, and probing with an nvidia-smi of our own."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from foretune.errors import UserError
from foretune.planning import parse_hardware, probe
from foretune.planning.machines import hardware
from foretune.planning.machines.catalogue import CARDS, GIB, find_card, normalised


@pytest.mark.parametrize(
    ("spec", "nodes", "devices", "name"),
    [
        ("8xH100-80GB", 1, 8, "H100-80GB"),
        ("2x8xA100-40GB", 2, 8, "A100-40GB"),
        ("1xRTX4090", 1, 1, "RTX4090-24GB"),
        ("H200", 1, 1, "H200-141GB"),
        ("4 x L4", 1, 4, "L4-24GB"),
        ("1xrtx 3090", 1, 1, "RTX3090-24GB"),
        ("4xcpu", 1, 4, "cpu"),
    ],
)
def test_descriptions(spec: str, nodes: int, devices: int, name: str) -> None:
    cluster = parse_hardware(spec)
    assert (cluster.nodes, cluster.devices_per_node, cluster.accelerator.name) == (nodes, devices, name)
    assert cluster.world_size == nodes * devices
    assert not cluster.probed


def test_options_are_taken_and_what_is_assumed_is_said() -> None:
    given = parse_hardware("2x8xH100,ram=2TB,link=pcie,net=400Gbps,cores=96")
    assert given.host_memory_bytes == 2048 * GIB
    assert given.cores_per_node == 96
    assert given.network_bandwidth == 400e9 / 8
    assert given.link_bandwidth < parse_hardware("2x8xH100").link_bandwidth
    assert given.notes == []
    assert "host memory" in parse_hardware("8xH100").notes[0]
    assert "between machines" in parse_hardware("2x8xH100,ram=1TB,cores=64").notes[0]


def test_a_cpu_shares_its_memory_and_cores() -> None:
    cluster = parse_hardware("4xcpu,ram=64GB,cores=16")
    assert cluster.accelerator.memory_bytes == 16 * GIB
    assert cluster.accelerator.peak_flops == 4 * parse_hardware("4xcpu,ram=64GB,cores=4").accelerator.peak_flops
    assert not cluster.accelerator.fp16


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("8xH900", "H100"),
        ("8xH100,ram=lots", "no quantity"),
        ("8xH100,disc=1TB", "no option 'disc'"),
        ("8xH100,ram", "no quantity"),
        ("0xH100", "number of devices"),
        ("", "not a description"),
        ("8x", "no accelerator"),
        ("1xA10O", "did you mean A1"),
    ],
)
def test_bad_descriptions(spec: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_hardware(spec)
    assert error.value.field == "--hardware"
    assert said in str(error.value)


def test_the_catalogue_is_large_and_unambiguous() -> None:
    assert len(CARDS) >= 25
    names = [normalised(alias) for card in CARDS for alias in (card.name, *card.aliases)]
    assert len({(name, find_card(name)) for name in names}) == len(set(names))
    for card in CARDS:
        assert find_card(card.name) == card
        boxed = float(card.name.rsplit("-", 1)[-1].removesuffix("GB"))
        assert 0.85 * boxed < card.memory_gib <= boxed


ROW = "{index}, GPU-{index}abc, {name}, {total}, {reserved}, {capability}"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH; a test writes the lines that nvidia-smi prints."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def prints(folder: Path, *rows: tuple[str, int, int, str]) -> None:
    lines = [
        ROW.format(index=index, name=name, total=total, reserved=reserved, capability=capability)
        for index, (name, total, reserved, capability) in enumerate(rows)
    ]
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_probe_reads_nvidia_smi(nvidia_smi: Path) -> None:
    prints(nvidia_smi, *[("NVIDIA H100 80GB HBM3", 81559, 550, "9.0")] * 4)
    cluster = probe()
    assert cluster.probed
    assert cluster.devices_per_node == 4
    assert cluster.accelerator.name == "H100-80GB"
    assert cluster.accelerator.bf16
    assert cluster.accelerator.memory_bytes == (81559 - 550) * 2**20
    assert probe(2).devices_per_node == 2
    with pytest.raises(UserError, match="4 GPU") as error:
        probe(5)
    assert error.value.field == "--nproc"


@pytest.mark.parametrize(
    ("name", "mib", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100-PCIE-80GB"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIE-80GB"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX4090-24GB"),
        ("Tesla V100-SXM2-16GB", 16160, "V100-16GB"),
        ("Tesla V100-SXM2-32GB", 32510, "V100-32GB"),
        ("Tesla T4", 15360, "T4-16GB"),
        ("NVIDIA L40S", 46068, "L40S-48GB"),
        ("NVIDIA L4", 23034, "L4-24GB"),
        ("NVIDIA A10G", 23028, "A10G-24GB"),
        ("NVIDIA RTX A6000", 49140, "RTXA6000-48GB"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX6000ADA-48GB"),
        ("NVIDIA H200", 143771, "H200-141GB"),
    ],
)
def test_names_that_nvidia_smi_prints(nvidia_smi: Path, name: str, mib: int, card: str) -> None:
    prints(nvidia_smi, (name, mib, 0, "8.0"))
    assert probe().accelerator.name == card


def test_an_unknown_card_keeps_its_memory(nvidia_smi: Path) -> None:
    prints(nvidia_smi, ("NVIDIA Something New", 50000, 0, "12.0"), ("NVIDIA Something New", 50000, 0, "12.0"))
    accelerator = probe().accelerator
    assert accelerator.name == "NVIDIA Something New"
    assert accelerator.memory_bytes == 50000 * 2**20
    assert accelerator.bf16


def test_an_old_unknown_card_has_no_bf16(nvidia_smi: Path) -> None:
    prints(nvidia_smi, ("Quadro Old", 16000, 0, "7.5"))
    assert not probe().accelerator.bf16


def test_different_cards_are_planned_for_the_weakest(nvidia_smi: Path) -> None:
    prints(nvidia_smi, ("NVIDIA H100 80GB HBM3", 81559, 0, "9.0"), ("Tesla T4", 15360, 0, "7.5"))
    cluster = probe()
    assert cluster.accelerator.memory_bytes == 15360 * 2**20
    assert not cluster.accelerator.bf16
    assert "different GPUs (H100-80GB, T4-16GB)" in cluster.notes[0]


def test_the_mask_of_visible_devices_is_honoured(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints(nvidia_smi, ("NVIDIA H100 80GB HBM3", 81559, 0, "9.0"), ("Tesla T4", 15360, 0, "7.5"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert probe().accelerator.name == "T4-16GB"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    assert probe().accelerator.name == "H100-80GB"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert probe().accelerator.kind == "cpu"


def test_a_broken_nvidia_smi_means_no_gpu(nvidia_smi: Path) -> None:
    script = nvidia_smi / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert probe(1).accelerator.kind == "cpu"


def test_this_machine_without_gpus(nvidia_smi: Path) -> None:
    prints(nvidia_smi)
    cluster = probe(2)
    assert cluster.accelerator.kind == "cpu"
    assert cluster.devices_per_node == 2
    assert cluster.accelerator.memory_bytes == cluster.host_memory_bytes // 2
    assert cluster.host_memory_bytes > 0
    assert probe().devices_per_node == hardware.default_cpu_ranks(hardware.usable_cores())
    with pytest.raises(UserError):
        probe(0)


def test_a_containers_limit_is_nearer_than_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text(f"{4 * GIB}\n")
    (tmp_path / "usage").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    monkeypatch.setattr(hardware, "CGROUP_FILES", ((tmp_path / "limit", tmp_path / "usage"),))
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert hardware.usable_host_memory() == 2 * GIB
    (tmp_path / "limit").write_text("max\n")
    assert hardware.usable_host_memory() == 8 * GIB
