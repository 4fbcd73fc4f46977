"""Tells Fabric which processes a launcher has started, as pretrain/launch.py found them."""

from __future__ import annotations

import os

from pretrain.fabric import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from pretrain.launch import Launch


class StepEnvironment(SLURMEnvironment):
    """Presents each srun task to Fabric as its own node with one device, which we choose.

    This way the step's variables decide. Lightning would read the job's, require --ntasks-per-node, and assume that a
    job named "interactive" runs without srun.
    """

    def __init__(self, launch: Launch) -> None:
        super().__init__(auto_requeue=False)
        self.launch = launch

    @staticmethod
    def _validate_srun_used() -> None: ...

    @staticmethod
    def _validate_srun_variables() -> None: ...

    @property
    def main_address(self) -> str:
        if address := os.environ.get("MASTER_ADDR"):
            return address
        names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
        nodes = next((os.environ[name] for name in names if os.environ.get(name)), "127.0.0.1")
        return self.resolve_root_node_address(nodes)

    @property
    def main_port(self) -> int:
        if port := os.environ.get("MASTER_PORT"):
            return int(port)
        # Concurrent steps of one job must not connect to each other.
        number = int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ["SLURM_STEP_ID"])
        return 15000 + number % 10000

    def world_size(self) -> int:
        return self.launch.world_size

    def global_rank(self) -> int:
        return self.launch.rank

    def node_rank(self) -> int:
        return self.launch.rank

    def local_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...


def environment_for_fabric(launch: Launch | None) -> ClusterEnvironment | None:
    """The cluster environment to pass to Fabric; None: Fabric detects it itself, as for torchrun."""
    if launch is not None and launch.by == "srun":
        return StepEnvironment(launch) if launch.world_size > 1 else LightningEnvironment()
    # Without srun, SLURM's variables don't describe this process.
    return LightningEnvironment() if launch is None and "SLURM_JOB_ID" in os.environ else None
