"""The two optimisers of the recipe and the averaged weights, with the state that a resumed run needs.

Parameters may be whole or kept in pieces (see `starflow.distributed`): both are updated in place where they lie.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from starflow.config import TrainConfig
from starflow.distributed import local, whole
from starflow.model import Flow

# Of Muon; the published values: momentum, the quintic of an iteration (its terms of degree 1, 3 and 5) and how many.
_MOMENTUM: Final = 0.95
_QUINTIC: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 5
# Length of an update of Muon, as root mean square: what one of AdamW has.
_LENGTH: Final = 0.2
# Numbers of the matrices that are orthogonalised at once. More fill a processor by themselves.
_AT_ONCE: Final = 1 << 22


class Optimizer:
    """AdamW over named parameters, or Muon for the matrices of layers beside it, with schedule and clipping.

    Muon moves a matrix along the orthogonal factor of its momentum, at a length that makes AdamW's learning rate fit:
    all directions learn at one speed, the rare ones too. What projects into and out of a network, its norms, biases and
    tables stay with AdamW.

    Args:
        parameters: name -> parameter.
        train: the recipe.
        peak: learning rate after the warm-up.
        betas: of AdamW.
        bfloat16: whether Muon orthogonalises in bfloat16 (see `gains_from_bfloat16`).

    Reference: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019); Jordan et al., Muon (2024); Liu et
    al., Muon is Scalable for LLM Training (2025), for the length.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        train: TrainConfig,
        peak: float,
        betas: tuple[float, float],
        *,
        bfloat16: bool,
    ) -> None:
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._train, self._peak = train, peak
        matrices = [p for name, p in parameters.items() if _by_muon(name, p, train)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self._parameters if id(p) not in chosen]
        adam = torch.optim.AdamW(rest, lr=peak, betas=betas, weight_decay=train.weight_decay, fused=True)
        self._optimizers: list[torch.optim.Optimizer] = [adam]
        # AdamW makes this at its first step; it is made here so that a training state can be read into it.
        for parameter in rest:
            adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if matrices:
            self._optimizers.append(Muon(matrices, lr=peak, weight_decay=train.weight_decay, bfloat16=bfloat16))
        self._state = {p: optimizer.state[p] for optimizer in self._optimizers for p in optimizer.state}

    def clip(self) -> Tensor:
        """Clips the gradients; returns their norm before, a scalar."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients, foreach=True))
        if self._train.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, self._train.grad_clip, norm, foreach=True)
        return norm

    def lr(self, updates: int) -> float:
        """Learning rate of the update that follows `updates` others."""
        train = self._train
        return cosine_lr(updates, warmup=train.warmup_steps, total=train.steps, peak=self._peak, floor=train.min_lr)

    def step(self, updates: int) -> None:
        """Makes one update, with the learning rate that follows `updates` others."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr(updates)
            optimizer.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name; they are the optimiser's own, to be read and written."""
        return {
            f"{name}/{key}": value
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for key, value in self._state[parameter].items()
        }


class Muon(torch.optim.Optimizer):
    """Moves matrices along the orthogonal factors of their momentum.

    As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, up to rounding, in two thirds of its time at the size
    of the demo: matrices of one shape, transposed ones too, are orthogonalised together.

    Args:
        parameters: matrices.
        lr: learning rate. weight_decay: decoupled, times `lr`.
        bfloat16: whether the factors are computed in bfloat16, as published, or in float32. Where a processor does not
            multiply in bfloat16, torch takes 30 times as long for it (AVX2): four fifths of a step of a small flow.

    Reference: Jordan et al., Muon (2024); Liu et al., Muon is Scalable for LLM Training (2025).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float, bfloat16: bool = True
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = torch.bfloat16 if bfloat16 else torch.float32
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Makes one update; parameters without a gradient stay."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            moments = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(moments, gradients, 1.0 - _MOMENTUM)
            torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
            updates = list(torch._foreach_lerp(gradients, moments, _MOMENTUM))
            for shape, places in _of_one_shape(updates):
                wide = [updates[i] if updates[i].shape == shape else updates[i].t() for i in places]
                factors = orthogonal(torch.stack(wide).to(self._dtype))
                for place, factor in zip(places, factors, strict=True):
                    parameter = parameters[place]
                    turned = factor if parameter.shape == shape else factor.t()
                    parameter.add_(turned, alpha=-group["lr"] * (_LENGTH * math.sqrt(max(shape))))


def _of_one_shape(matrices: list[Tensor]) -> Iterator[tuple[torch.Size, list[int]]]:
    """Places of matrices that are of one shape when none is taller than wide, as many as go together."""
    places = defaultdict(list)
    for place, matrix in enumerate(matrices):
        shape = matrix.shape if matrix.shape[0] <= matrix.shape[1] else matrix.shape[::-1]
        places[shape].append(place)
    for shape, found in places.items():
        count = max(1, _AT_ONCE // shape.numel())
        for first in range(0, len(found), count):
            yield shape, found[first : first + count]


def orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal factors of matrices, by Newton-Schulz: singular values go to between 0.7 and 1.2, not to 1.

    Args:
        matrices: (count, rows, columns), rows at most columns, in the dtype in which all is computed.

    Returns:
        Like it.

    Reference: Jordan et al., Muon (2024).
    """
    first, third, fifth = _QUINTIC
    # The spectral norm is at most that of all numbers.
    x: Tensor = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return x


def _by_muon(name: str, parameter: Tensor, train: TrainConfig) -> bool:
    """Whether Muon takes a parameter: the matrix of a product inside of a transformer layer."""
    return train.optimizer == "muon" and parameter.dim() == 2 and ".layers." in f".{name}"


def moments_of(flow: Flow, train: TrainConfig) -> int:
    """Numbers that the optimisers of a flow keep beside its weights: two for each, one where Muon takes them."""
    return sum(
        parameter.numel() * (1 if _by_muon(name, parameter, train) else 2)
        for name, parameter in flow.named_parameters()
    )


class Average:
    """An exponential moving average of everything a flow holds, buffers and denoiser included.

    Early updates count more (decay at most `(1 + n) / (10 + n)` after n updates), so that a short run is not an
    average over its random start.

    Args:
        source: the flow that is trained.
        target: a copy of it, which becomes the average; or the flow itself, which then is its own average.
        decay: of the average.
    """

    def __init__(self, source: Flow, target: Flow, decay: float) -> None:
        self.flow = target if target is source else target.requires_grad_(False).eval()
        self._decay = decay
        self._source = _tensors(source)
        self._target = self._source if target is source else _tensors(target)

    @torch.no_grad()
    def reset(self) -> None:
        """Sets the average to the current weights."""
        torch._foreach_copy_(self._target, self._source)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Adds the current weights to the average, after `updates` earlier ones."""
        if self._target is self._source:
            return
        decay = min(self._decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(self._target, self._source, 1.0 - decay)


def _tensors(flow: Flow) -> list[Tensor]:
    return [local(tensor.detach()) for tensor in flow.state_dict().values()]


def make_optimizers(flow: Flow, train: TrainConfig, *, bfloat16: bool) -> tuple[Optimizer, Optimizer | None]:
    """The optimiser of the flow and that of the denoiser, if there is one; see `Optimizer`."""
    named = dict(flow.named_parameters())
    denoiser = {name: p for name, p in named.items() if name.startswith("denoiser.")}
    rest = {name: p for name, p in named.items() if name not in denoiser}
    main = Optimizer(rest, train, train.lr, (train.beta1, train.beta2), bfloat16=bfloat16)
    # The published recipe leaves the denoiser's betas at their defaults.
    if not denoiser:
        return main, None
    return main, Optimizer(denoiser, train, train.denoiser_lr, (0.9, 0.999), bfloat16=bfloat16)


def cosine_lr(step: int, *, warmup: int, total: int, peak: float, floor: float) -> float:
    """Linear warm-up, then a cosine to the floor.

    Args:
        step: scheduler steps taken; 0 before the first update.
        warmup: steps of warm-up, from min(floor, 1e-6) to `peak`.
        total: steps of the whole run; the floor is held after it.
        peak, floor: learning rates.

    Returns:
        The learning rate of the next update.
    """
    if step <= warmup:
        begin = min(floor, 1e-6)
        return begin + (peak - begin) * (step / warmup if warmup else 1.0)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)
