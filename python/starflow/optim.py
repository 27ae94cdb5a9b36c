"""The two optimisers of the recipe, the averaged weights, and what of them a resumed run needs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from starflow.config import TrainConfig
from starflow.flow import Flow
from starflow.schedule import cosine_lr


class Optimizer:
    """AdamW over named parameters with the schedule of the recipe and clipping.

    Args:
        parameters: name -> parameter.
        train: the recipe.
        peak: learning rate after the warm-up.
        betas: of AdamW.

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019).
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], train: TrainConfig, peak: float, betas: tuple[float, float]
    ) -> None:
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._train, self._peak = train, peak
        self._adam = torch.optim.AdamW(
            self._parameters, lr=peak, betas=betas, weight_decay=train.weight_decay, fused=True
        )

    def clip(self) -> Tensor:
        """Clips the gradients; returns their norm before, a scalar."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if self._train.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, self._train.grad_clip, norm, foreach=True)
        return norm

    def lr(self, updates: int) -> float:
        """Learning rate of the update that follows `updates` others."""
        train = self._train
        return cosine_lr(updates, warmup=train.warmup_steps, total=train.steps, peak=self._peak, floor=train.min_lr)

    def step(self, updates: int) -> None:
        """One update at the learning rate of its number."""
        for group in self._adam.param_groups:
            group["lr"] = self.lr(updates)
        self._adam.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name; empty before the first update."""
        moments = self._adam.state_dict()["state"]
        return {
            f"{name}/{key}": value
            for index, name in enumerate(self._names)
            for key, value in moments.get(index, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        moments: dict[int, dict[str, Tensor]] = {}
        index = {name: number for number, name in enumerate(self._names)}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            moments.setdefault(index[name], {})[part] = value
        self._adam.load_state_dict({"state": moments, "param_groups": self._adam.state_dict()["param_groups"]})


class Average:
    """An exponential moving average of everything a flow holds, buffers and denoiser included.

    Early updates count more (decay at most `(1 + n) / (10 + n)` after n updates), so that a short run is not an
    average over its random start.

    Args:
        flow: that is trained.
        decay: of the average; 0 follows the weights.
    """

    def __init__(self, flow: Flow, decay: float) -> None:
        self.flow = copy.deepcopy(flow).requires_grad_(False).eval()
        self._decay = decay
        self._source = list(_tensors(flow))
        self._target = list(_tensors(self.flow))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes the current weights in, after `updates` earlier ones."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._target, self._source, 1.0 - decay)


def _tensors(flow: Flow) -> Iterable[Tensor]:
    return (tensor.detach() for tensor in flow.state_dict().values())


def make_optimizers(flow: Flow, train: TrainConfig) -> tuple[Optimizer, Optimizer | None]:
    """The optimiser of the flow and that of the denoiser, if there is one."""
    named = dict(flow.named_parameters())
    denoiser = {name: p for name, p in named.items() if name.startswith("denoiser.")}
    rest = {name: p for name, p in named.items() if name not in denoiser}
    main = Optimizer(rest, train, train.lr, (train.beta1, train.beta2))
    # The published recipe leaves the denoiser's betas at their defaults.
    second = Optimizer(denoiser, train, train.denoiser_lr, (0.9, 0.999)) if denoiser else None
    return main, second
