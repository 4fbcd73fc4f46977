"""The part of Lightning Fabric that a run uses, imported without torchmetrics and without torch.compile's machinery.

`lightning_fabric` imports torchmetrics to compare its version, for a class that nothing here uses; and torchmetrics
imports transformers, matplotlib and pandas where they are installed. It imports `torch._dynamo` to recognise a whole
module that was compiled; here only blocks are, in place (pretrain/compiling.py). Together they were half of each rank's
start, and thousands of files to open on a cluster's file system.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any


class _WithoutDynamo(ModuleType):
    """Stands in for `torch._dynamo` while Fabric is imported: no module is an instance of its OptimizedModule."""

    OptimizedModule = type("OptimizedModule", (), {})


_modules: dict[str, Any] = sys.modules
# None: importing it raises ImportError, as if it were not installed.
_hidden = {"torchmetrics": None, "torch._dynamo": _WithoutDynamo("torch._dynamo")}
_hidden = {name: module for name, module in _hidden.items() if name not in _modules}
_modules |= _hidden
try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
finally:
    for _name in _hidden:
        del _modules[_name]

# Its banner of process groups and its advice to lower the precision of float32: a run's first lines say what matters.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

__all__ = [
    "ClusterEnvironment",
    "DDPStrategy",
    "Fabric",
    "LightningEnvironment",
    "ModelParallelStrategy",
    "SLURMEnvironment",
    "Strategy",
]
