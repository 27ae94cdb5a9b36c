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
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

# Tensors in pieces and their checkpoints are imported where they are used: they take most of a second.
if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["ALONE", "DistributedError", "World", "join", "local", "rank_and_size", "whole"]

logger = logging.getLogger(__name__)

Kind = TypeVar("Kind")

Parallel = Literal["ddp", "fsdp"]

# Seconds between signs of life, without one until a process counts as dead, and until a process that waits for a dead
# one in vain is ended: under a minute together.
BEAT = 1.0
SILENCE = 30.0
GRACE = 15.0
# Of a collective: long, since a checkpoint of one process makes the others wait; the dead are found by their silence.
TIMEOUT = timedelta(hours=2)
# Bytes of a file of a training state: what is held twice in memory while it is written.
FILE_BYTES = 1 << 30

# What the communication libraries say when the other side is gone.
_LOST = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "timed out", "timeout")


class DistributedError(RuntimeError):
    """Another process of the run stopped; the message says which and why, where it could tell."""


def rank_and_size() -> tuple[int, int]:
    """Number of this process and of all that `torchrun` started; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


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
    """The processes of a run. What is not said to be local is a collective: all of them call it, in the same order.

    Args:
        rank: number of this process. size: of all.
        device: where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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
        """Whether it holds in any process."""
        return self.mean(float(flag)) > 0.0 if self.size > 1 else flag

    def share(self, make: Callable[[], Kind]) -> Kind:
        """What `make` returns in the first process, where alone it is called; something that can be pickled."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: Kind) -> list[Kind]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

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
                # It warns that there is but one process.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                call(tensors, no_dist=self.size == 1, **how)
        except CheckpointException as error:
            # Not an Exception, and its text holds the tracebacks of all processes.
            causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
            if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
                raise KeyboardInterrupt from None
            cause = next((cause for cause in causes if isinstance(cause, Exception)), None)
            raise (cause if isinstance(cause, OSError | RuntimeError) else RuntimeError(str(cause or error))) from None


ALONE = World()


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is written of tensors: nothing of empty ones, and scalars as vectors of one (the same memory)."""
    return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in tensors.items() if tensor.numel()}


# -- gradients --------------------------------------------------------------------------------------------------------


# -- the processes ----------------------------------------------------------------------------------------------------


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The processes that `torchrun` started, for as long as the block lasts; alone without it.

    Only the first process logs. An error in one process ends the others with a `DistributedError` that quotes it, and
    a process that dies without a word does so by its silence, both within a minute.

    Args:
        device: to compute on; "cuda" takes the one of this process's number on its machine.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield World(device=device)
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=60))))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    watch = _Watch(store.clone(), rank, size)
    with _quiet() if rank else nullcontext():
        try:
            watch.start()
            yield World(rank, size, device)
            # In this order: whoever passes the barrier may be gone before the others look.
            watch.stop()
            dist.barrier()
        except Exception as error:
            reason = watch.fail(error)
            watch.stop()
            if reason is not None:
                raise DistributedError(reason) from error
            raise
        finally:
            watch.stop()
            if device.type == "cpu":
                # NCCL would wait here for those that are gone.
                dist.destroy_process_group()
    if device.type == "cuda":
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


class _Watch(threading.Thread):
    """Gives signs of life and looks for those of others: all look at the first process, which looks at all.

    Args:
        store: a connection of its own. rank, size: of this process.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        super().__init__(daemon=True, name="starflow-watch")
        self._store, self._rank, self._size = store, rank, size
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._reason: str | None = None

    def stop(self) -> None:
        """Ends the watch; may be called again."""
        self._done.set()

    def fail(self, error: Exception) -> str | None:
        """Tells the others of an error of this process; returns what ended the run where that was another one."""
        own = f"process {self._rank} of {self._size} stopped: {type(error).__name__}: {' '.join(str(error).split())}"
        text = f"{type(error).__name__} {error}".lower()
        lost = isinstance(error, RuntimeError) and any(word in text for word in _LOST)
        if lost:
            own = f"a process of the {self._size} is gone: {' '.join(str(error).split())[:300]}"
        first = self._reason
        if first is None:
            try:
                with self._lock:
                    first = self._store.compare_set("failed", "", own).decode()
            except RuntimeError:
                first = own
        if first == own and self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # The store goes with this process: let the others read it.
            time.sleep(2.5 * BEAT)
        return first if lost or first != own else None

    def run(self) -> None:
        """Watches until `stop`; ends the process where another is gone and this one does not notice."""
        count = 0
        while self._reason is None and not self._done.wait(BEAT):
            count += 1
            try:
                with self._lock:
                    self._reason = self._look(count)
            except RuntimeError as error:
                if self._done.is_set():
                    return
                self._reason = f"the store of the run is gone, and with it the machine of the first process: {error}"
        if self._reason is None or self._done.wait(GRACE):
            return
        logger.error("%s", self._reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _look(self, count: int) -> str | None:
        self._store.set(f"alive/{self._rank}", str(count))
        if self._store.check(["failed"]):
            return str(self._store.get("failed"), "utf-8")
        now = time.monotonic()
        for rank in range(1, self._size) if self._rank == 0 else (0,):
            key = f"alive/{rank}"
            sign = self._store.get(key) if self._store.check([key]) else b""
            if sign != self._seen.get(rank, (None, now))[0]:
                self._seen[rank] = (sign, now)
            elif now - self._seen[rank][1] > SILENCE:
                return str(self._store.compare_set("failed", "", f"process {rank} of {self._size} is silent"), "utf-8")
        return None
