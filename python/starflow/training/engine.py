"""Engine: calls a flow in several processes, so that its gradients become means over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from starflow.distributed import Parallel, World
from starflow.model import Conditioner, Encoded, Flow, Transformer

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class _Encoder(nn.Module):
    """The blocks of a flow as a module whose call is `Flow.encode`, as DistributedDataParallel needs it."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.blocks = flow.blocks
        self._encode = flow.encode

    def forward(self, x: Tensor, y: Tensor | None, frame_conditions: Tensor | None) -> Encoded:
        """See `Flow.encode`."""
        return self._encode(x, y, frame_conditions)


class Engine:
    """Calls a flow so that gradients become means over the processes.

    Args:
        flow: the same in all processes, whole.
        world: of the run.
        parallel: "ddp" keeps a replica of everything in each process, "fsdp" a piece.

    Attributes:
        encode: as `Flow.encode`.
        denoiser: as the flow's, or None.
    """

    encode: Callable[[Tensor, Tensor | None, Tensor | None], Encoded]
    denoiser: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None

    def __init__(self, flow: Flow, world: World, parallel: Parallel) -> None:
        self.encode, self.denoiser = flow.encode, flow.denoiser
        self._replicas: list[DistributedDataParallel] = []
        self._sharded: list[FSDPModule] = []
        if world.size > 1 and parallel == "fsdp":
            self._sharded = shard(flow, world)
        elif world.size > 1:
            device = [world.device] if world.device.type == "cuda" else None
            modules = [_Encoder(flow), *([] if flow.denoiser is None else [flow.denoiser])]
            with warnings.catch_warnings():
                # The option's new name is unknown to the oldest torch that this package runs with.
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
                self._replicas = [
                    DistributedDataParallel(
                        module, device_ids=device, broadcast_buffers=False, gradient_as_bucket_view=True
                    )
                    for module in modules
                ]
            self.encode = self._replicas[0]
            self.denoiser = None if flow.denoiser is None else self._replicas[1]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Computes a part of a batch inside; gradients go to the other processes with the last part only."""
        for network in self._sharded:
            network.set_requires_gradient_sync(last)
        with ExitStack() as stack:
            if self._sharded:
                stack.enter_context(warnings.catch_warnings())
                # FSDP warns of in-place writes to views of a network's output; nothing here writes to one.
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            for replica in () if last else self._replicas:
                stack.enter_context(replica.no_sync())
            yield


def shard(flow: Flow, world: World) -> list[FSDPModule]:
    """Cuts every parameter of a flow into as many pieces as there are processes, in place.

    A layer is made whole while it computes, forward and backward, and so is the rest of each network. The flow can also
    be decoded (in plain torch) and sampled from, by calls that all processes make alike.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    networks = [module for module in flow.modules() if isinstance(module, Transformer)]
    sharded: list[FSDPModule] = []
    for network in networks:
        pieces = [fully_shard(layer, mesh=mesh) for layer in network.layers]
        sharded.append(fully_shard(network, mesh=mesh))
        network.in_pieces = True
        if isinstance(network, Conditioner):
            for entry in ("window", "prefill_text"):
                register_fsdp_forward_method(network, entry)
        # The tensors that weights are gathered into are made at the first call and kept. Were that a call in inference
        # mode, as decoding is, no gradient could go through them later, as the step along the score needs it to.
        for piece in (*pieces, sharded[-1]):
            piece.unshard()
            piece.reshard()
    return sharded
