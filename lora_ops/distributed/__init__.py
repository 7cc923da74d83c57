"""Beyond one process, on torch.distributed: what DDP, fully_shard, tensor parallelism and pipelines need beside torch.

DistributedDataParallel and pipelines take the layers as they are. Needs torch 2.7 or later; docs/distributed.md says how to use
each, and what it sends.
"""

from .checkpoint import AdapterState
from .sharding import register_4bit
from .tensor_parallel import ColwiseLora, RowwiseLora

__all__ = ["AdapterState", "ColwiseLora", "RowwiseLora", "register_4bit"]
