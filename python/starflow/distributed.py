"""Processes that train one flow together: who they are, what they share, and what happens when one of them dies.

`torchrun` starts them. Each computes its rows of the global batch; gradients are averaged over all of them, either of
whole replicas (`DistributedDataParallel`) or with every parameter, gradient and moment kept in pieces (`fully_shard`).
A batch, its noise and its loss are those of a single process, so the number of processes is no part of a run. The model
knows nothing of all this: training calls it through an `Engine`.

Reference: Li et al., PyTorch Distributed (2020); Zhao et al., PyTorch FSDP (2023).
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from starflow.messages import shown

# Tensors in pieces and their checkpoints are imported where they are used: they take most of a second.
if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["ALONE", "DistributedError", "World", "join", "local", "rank_and_size", "whole"]

Kind = TypeVar("Kind")

Parallel = Literal["ddp", "fsdp"]

# Until a collective of a step gives up on a process that is silent; all processes do the same work in a step.
TIMEOUT = timedelta(minutes=10)
# Until one gives up that waits for what a process does alone: a large model file, samples, a larger share of prompts.
PATIENCE = timedelta(hours=2)
# Bytes of one file of a training state, which is in memory a second time while it is written.
FILE_BYTES = 1 << 30


class DistributedError(RuntimeError):
    """Another process of the run stopped; the message says which and why, where it could tell."""


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all that `torchrun` started; (0, 1) without it.

    Raises:
        DistributedError: variables of the environment that are no such numbers.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise DistributedError(
            f"RANK is {shown(rank)} and WORLD_SIZE {shown(size)} in the environment, expected the number of this "
            "process and of all, as torchrun sets them, or neither"
        )
    return int(rank), int(size)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is kept in pieces (all processes call this together), or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, which shares its memory, or the tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class World:
    """The processes of a run. A method is a collective, which all processes call in the same order, unless it says
    local.

    Args:
        rank: number of this process. size: number of all processes.
        device: where it computes.
        patient: the same processes, over gloo and with a long timeout.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    patient: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and shows progress (local)."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Mean over the processes; NaN for all where it is NaN for one."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.mean(float(flag)) > 0.0 if self.size > 1 else flag

    def share(self, make: Callable[[], Kind]) -> Kind:
        """The result of `make`, which the first process alone calls; it must be possible to pickle it."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: Kind) -> list[Kind]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.patient)
        return found

    def wait(self) -> None:
        """Returns when all processes have called it, however long one of them has worked alone before."""
        if self.size > 1:
            dist.monitored_barrier(self.patient, PATIENCE)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one dtype by their means over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of whole tensors on the CPU, in the first process; empty in the others."""
        found = {}
        for name, tensor in state.items():
            full = whole(tensor.detach())
            if self.first:
                found[name] = full.cpu()
        return found

    # -- training states ----------------------------------------------------------------------------------------------

    def save(self, tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
        """Writes tensors as safetensors, each process its pieces and the first one what all of them hold.

        Args:
            tensors: by name, the same names in all processes.
            folder: that all of them see; it exists and is empty.

        Returns:
            Names of the files that this process wrote.

        Raises:
            RuntimeError, OSError: something cannot be written; raised in all processes.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        kept = {name: tensor.contiguous() for name, tensor in _stored(tensors).items()}
        files, size = {}, 0
        for name, tensor in kept.items():
            files[name] = 1 + size // FILE_BYTES
            size += tensor.numel() * tensor.element_size() // self.size
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        self._transfer(save, kept, storage_writer=writer)
        return sorted(path.name for path in folder.glob(f"shard-{self.rank + 1:05d}-*"))

    def load(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Reads what any number of processes wrote with `save` into tensors of the same names and shapes.

        Raises:
            RuntimeError, OSError: something is missing or of another shape; raised in all processes.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        self._transfer(load, _stored(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))

    def _transfer(self, call: Callable[..., Any], tensors: dict[str, Tensor], **how: Any) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            with warnings.catch_warnings():
                # torch warns that there is only one process.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                call(tensors, no_dist=self.size == 1, process_group=self.patient, **how)
        except CheckpointException as error:
            # Not an Exception, and its text holds the tracebacks of all processes.
            causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
            if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
                raise KeyboardInterrupt from None
            cause = next((cause for cause in causes if isinstance(cause, Exception)), None)
            raise (cause if isinstance(cause, OSError | RuntimeError) else RuntimeError(str(cause or error))) from None


ALONE = World()


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are written: empty ones are left out, scalars become vectors of one that share their memory."""
    return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in tensors.items() if tensor.numel()}


# -- the processes ----------------------------------------------------------------------------------------------------


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The processes that `torchrun` started, for as long as the block lasts; alone without it.

    Only the first process logs. When a process ends, by an error or killed, its connections close, and the others end
    where they wait for it, with a `DistributedError` that quotes the error or names the process. (NCCL does not notice
    closed connections; there `torchrun` ends the others.) A process that is silent ends the others after `TIMEOUT`.

    Args:
        device: to compute on; "cuda" takes the one of this process's number on its machine.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield World(device=device)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise DistributedError(
            f"RANK is {rank} and WORLD_SIZE {size} in the environment and {' and '.join(missing)} is not set, expected "
            "all that torchrun sets, or none"
        )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=60))))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    world = World(rank, size, device, dist.new_group(backend="gloo", timeout=PATIENCE))
    with _quiet() if rank else nullcontext():
        try:
            yield world
            world.wait()
        except Exception as error:
            reason = _ended_by(error, world, store.clone())
            if reason is None:
                raise
            raise DistributedError(reason) from error
        finally:
            dist.destroy_process_group()


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only: the first process says the rest."""
    ours = logging.getLogger("starflow")
    before = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(before)


def _ended_by(error: Exception, world: World, store: Store) -> str | None:
    """What ended a run that this process leaves with an error: None where the error is its own.

    A collective fails with a plain RuntimeError when another process has closed its connection or does not answer, so
    such an error may have its cause elsewhere; an error of another type has not. The first of either kind is kept in
    the store, which `torchrun` holds; with another launcher it ends with the first process.
    """
    vague = type(error) is RuntimeError or isinstance(error, dist.DistError)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    gone = _unreachable(world) if vague else []
    if gone:
        own = f"process {' and '.join(map(str, gone))} of {world.size} is gone: {text}"
    else:
        own = f"process {world.rank} of {world.size} stopped: {text}"
    first = own
    with suppress(dist.DistError):
        first = store.compare_set("suspected" if vague else "failed", "", own).decode()
        if vague and store.check(["failed"]):
            first = store.get("failed").decode()
    return None if first == own and not gone else first


def _unreachable(world: World) -> list[int]:
    """Processes that have closed their connections to this one."""
    gone = set()
    # What is sent to a closed connection is answered by a reset, and the next message fails.
    for _ in range(2):
        for rank in range(world.size):
            if rank != world.rank and rank not in gone:
                try:
                    dist.isend(torch.zeros(1), rank, world.patient)
                except RuntimeError:
                    gone.add(rank)
        time.sleep(0.2)
    return sorted(gone)
