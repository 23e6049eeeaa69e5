"""Hardware: a cluster that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.constants import CROSS_NODE_BANDWIDTH, DDR_CAP, DDR_MEM_BW, HBM_MEM_BW, INTRA_NODE_BANDWIDTH

from distmtl.distributed.planner import GLOO_BANDWIDTH

GIB = 2**30
BYTES_PER_MS = GIB / 1000  # TorchRec's unit of bandwidth, of one GB/s


@dataclass(frozen=True)
class Hardware:
    """A pretend cluster. Bandwidths default to what TorchRec assumes, and training with it. Memory and host memory are per rank."""

    device: str = "cuda"
    ranks_per_node: int = 8
    hbm_gb: float = 80.0
    ddr_gb: float = DDR_CAP / GIB
    intra_gb_s: float = INTRA_NODE_BANDWIDTH / BYTES_PER_MS
    inter_gb_s: float = CROSS_NODE_BANDWIDTH / BYTES_PER_MS
    hbm_gb_s: float = HBM_MEM_BW / BYTES_PER_MS
    ddr_gb_s: float = DDR_MEM_BW / BYTES_PER_MS

    @classmethod
    def of(cls, device: str, **given: Any) -> Hardware:
        """With the bandwidths that training assumes on this device, where none are given."""
        gloo = dict.fromkeys(("intra_gb_s", "inter_gb_s"), GLOO_BANDWIDTH / BYTES_PER_MS) if device == "cpu" else {}
        return cls(**{"device": device, **gloo, **given})

    @property
    def memory(self) -> str:
        """Where tables live: TorchRec's name of it."""
        return "hbm" if self.device == "cuda" else "ddr"

    def local_world_size(self, world_size: int) -> int:
        return min(self.ranks_per_node, world_size)

    def topology(self, world_size: int) -> Topology:
        return Topology(
            world_size=world_size,
            local_world_size=self.local_world_size(world_size),
            compute_device=self.device,
            hbm_cap=int(self.hbm_gb * GIB),
            ddr_cap=int(self.ddr_gb * GIB),
            intra_host_bw=self.intra_gb_s * BYTES_PER_MS,
            inter_host_bw=self.inter_gb_s * BYTES_PER_MS,
            hbm_mem_bw=self.hbm_gb_s * BYTES_PER_MS,
            ddr_mem_bw=self.ddr_gb_s * BYTES_PER_MS,
        )

    def memory_in(self, topology: Any, memory: str | None = None) -> float:
        """Bytes of a rank, where tables live unless they say otherwise, or in TorchRec's `memory`."""
        return float(getattr(topology.devices[0].storage, memory or self.memory))
