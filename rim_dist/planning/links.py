"""What connects the GPUs of a cluster, by name."""

from __future__ import annotations

from dataclasses import dataclass

# NCCL's own model of a collective (src/graph/tuning.cc, protocol Simple): seconds to start, seconds a step of a ring over
# NVLink, PCIe and the network, and a step of a tree within a node and between nodes.
START_SECONDS = 8.4e-6
NVLINK_STEP_SECONDS, PCIE_STEP_SECONDS, NETWORK_STEP_SECONDS = 3.4e-6, 5.7e-6, 9.6e-6
TREE_NODE_SECONDS, TREE_NETWORK_SECONDS = 28e-6, 50e-6


@dataclass(frozen=True)
class Interconnect:
    """Links in bytes a second, one direction, as data sheets have them. `network`: of an adapter; each GPU has its own
    (`own_adapter`), or a node has one."""

    name: str
    node: float
    network: float
    own_adapter: bool
    host: float
    step_seconds: float
    about: str

    def network_of_gpu(self, gpus_per_node: int) -> float:
        return self.network if self.own_adapter else self.network / gpus_per_node


INTERCONNECTS = {
    link.name: link
    for link in (
        Interconnect(
            "nvlink+ib-400g", 450e9, 50e9, True, 63e9, NVLINK_STEP_SECONDS,
            "DGX/HGX H100: NVLink 4, 900 GB/s both ways; a 400 Gb/s InfiniBand NDR adapter a GPU; PCIe 5.0 x16",
        ),
        Interconnect(
            "nvlink+ib-200g", 300e9, 25e9, True, 31.5e9, NVLINK_STEP_SECONDS,
            "DGX A100: NVLink 3, 600 GB/s both ways; a 200 Gb/s InfiniBand HDR adapter a GPU; PCIe 4.0 x16",
        ),
        Interconnect(
            "ib-400g", 63e9, 50e9, False, 63e9, PCIE_STEP_SECONDS,
            "PCIe 5.0 x16 between the GPUs of a node, one 400 Gb/s InfiniBand NDR adapter a node",
        ),
        Interconnect(
            "ib-200g", 31.5e9, 25e9, False, 31.5e9, PCIE_STEP_SECONDS,
            "PCIe 4.0 x16 between the GPUs of a node, one 200 Gb/s InfiniBand HDR adapter a node",
        ),
        Interconnect(
            "ethernet-100g", 31.5e9, 12.5e9, False, 31.5e9, PCIE_STEP_SECONDS,
            "PCIe 4.0 x16 between the GPUs of a node, one 100 Gb/s Ethernet adapter a node",
        ),
        Interconnect(
            "ethernet-25g", 31.5e9, 3.125e9, False, 31.5e9, PCIE_STEP_SECONDS,
            "PCIe 4.0 x16 between the GPUs of a node, one 25 Gb/s Ethernet adapter a node",
        ),
    )
}  # fmt: skip
