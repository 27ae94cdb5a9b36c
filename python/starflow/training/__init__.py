"""How does the flow learn? Batches, optimisers, the loop over steps, and the plan of a run."""

from starflow.training.batches import Batch, Batches, make_dataset, make_parts
from starflow.training.engine import shard
from starflow.training.plan import GIB, Plan, fitting, plan
from starflow.training.trainer import Trainer, TrainingError, TrainStep, train

__all__ = [
    "GIB",
    "Batch",
    "Batches",
    "Plan",
    "TrainStep",
    "Trainer",
    "TrainingError",
    "fitting",
    "make_dataset",
    "make_parts",
    "plan",
    "shard",
    "train",
]
