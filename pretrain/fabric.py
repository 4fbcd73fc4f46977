"""What we use of Lightning Fabric, imported without torchmetrics.

`lightning_fabric` imports torchmetrics to compare its version, for a class that nothing here uses; and torchmetrics
imports transformers, matplotlib and pandas where they are installed: a quarter of the time of each rank's start, and
thousands of files to open on a cluster's file system.
"""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_hidden = "torchmetrics" not in _modules
if _hidden:
    _modules["torchmetrics"] = None  # importing it raises ImportError, as if it were not installed
try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
finally:
    if _hidden:
        del _modules["torchmetrics"]

__all__ = [
    "ClusterEnvironment",
    "DDPStrategy",
    "Fabric",
    "LightningEnvironment",
    "ModelParallelStrategy",
    "SLURMEnvironment",
    "Strategy",
]
