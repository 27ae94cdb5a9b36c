"""Features of frames: numbers in which sets of frames are compared, from a network trained on the data itself.

A Fréchet distance is as good as its features. Those of ImageNet know photographs; moving digits, games and small frames
are outside of what they were trained on. `FrameFeatures` is a small convolutional network that learns, from real frames
alone, to restore frames that were spoiled and to tell how each was spoiled (noise, blur, a blend with another frame,
patches of another frame, a change of contrast). The first task makes its features hold what a frame shows, the second
makes them differ where a frame is unlike any real one. It is trained once, then frozen: what is compared with one
another is measured by one and the same network.

Reference: Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders (2008); Sinha et al.,
Negative Data Augmentation (2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from starflow.codecs import tell_scale
from starflow.inference import plain_modes
from starflow.messages import shown
from starflow.numeric import integer

# Of each kind of harm, the share of the frames that have it in training.
_SHARE = 0.35
_KINDS = 5
# Side of the pictures that are restored, at most: the size of what a frame shows, where features have few numbers.
_RESTORED = 32
_SIDE = 4
_BATCH = 128
_RATE = 2e-3
# Directions in which real frames hardly vary are not blown up beyond this share of the mean variance: without it they
# would be half of the distance, as noise; without whitening at all, what a frame shows would hide how sharp it is.
_RIDGE = 0.1
# What a model makes may overshoot [-1, 1]; beyond this, values are of another scale, such as 0 to 255.
_FAR = 16.0


class FrameFeatures(nn.Module):
    """A small convolutional network from frames to features, of mean 0 and whitened over the frames it was fitted to.

    Made by `fit`; a network with the same arguments takes its `state_dict`. It is frozen: in evaluation mode and
    without gradients of its weights.

    Args:
        channels: of the frames.
        size: height and width of the frames.
        num_features: numbers that a frame becomes.

    Example:
        >>> features = FrameFeatures.fit(torch.rand(64, 1, 16, 16) * 2 - 1, steps=2)
        >>> features(torch.zeros(3, 1, 16, 16)).shape
        torch.Size([3, 64])
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, channels: int, size: tuple[int, int], num_features: int = 64) -> None:
        super().__init__()
        self.channels, self.size, self.num_features = channels, size, num_features
        layers: list[nn.Module] = []
        before, width = channels, 32
        for _ in range(max(1, round(math.log2(min(size) / _SIDE)))):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GELU()]
            before, width = width, min(2 * width, 128)
        self.convolutions = nn.Sequential(*layers)
        self.out = nn.Linear(before * _SIDE**2, num_features)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("whitening", torch.eye(num_features))
        self.eval().requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Features of frames.

        Args:
            frames: (count, channels, height, width) in [-1, 1].

        Returns:
            (count, num_features) in the dtype of the weights, float32.

        Raises:
            ValueError: frames of another size or number of channels than the network was made for.
        """
        expected = [self.channels, *self.size]
        if frames.ndim != 4 or list(frames.shape[1:]) != expected:
            raise ValueError(
                f"FrameFeatures: frames have shape {list(frames.shape)}, expected (count, channels, height, width), "
                f"the last three {expected}"
            )
        return (self._code(frames.to(self.mean.dtype)) - self.mean) @ self.whitening

    def _code(self, frames: Tensor) -> Tensor:
        maps = F.adaptive_avg_pool2d(self.convolutions(frames), _SIDE)
        code: Tensor = self.out(maps.flatten(1))
        return code

    @classmethod
    @plain_modes()
    def fit(cls, frames: Tensor, *, seed: int = 0, steps: int = 400, num_features: int = 64) -> FrameFeatures:
        """Trains a network on real frames and freezes it.

        The same frames, seed and number of threads give the same network. 400 steps take about 25 seconds of one core
        for frames of 32 x 32.

        Args:
            frames: (count, channels, height, width) in [-1, 1]; `frame_differences` of clips for features of motion.
            seed: of the first weights, the batches and the harm.
            steps: of training.
            num_features: numbers that a frame becomes.

        Raises:
            ValueError: frames of another shape or type, fewer than two or all alike, values that are not finite or far
                outside of [-1, 1], or a number below 1.
        """
        _check_frames("FrameFeatures.fit", frames)
        for name, value in (("steps", steps), ("num_features", num_features)):
            if (whole := integer(value)) is None or whole < 1:
                raise ValueError(f"FrameFeatures.fit: {name} is {shown(value)}, expected an integer of at least 1")
        frames = frames.detach().float().cpu().clone()
        spread = float(frames.var(0).mean())
        if not spread > 0.0:
            raise ValueError("FrameFeatures.fit: all frames are alike, expected frames that differ")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(frames.shape[1], (frames.shape[2], frames.shape[3]), num_features)
            made._learn(frames, spread, steps)
        made.eval().requires_grad_(False)
        with torch.no_grad():
            codes = torch.cat([made._code(part) for part in frames.split(256)]).double()
            made.mean.copy_(codes.mean(0))
            made.whitening.copy_(_whitening(codes))
        return made

    def _learn(self, frames: Tensor, spread: float, steps: int) -> None:
        """Training by the random state of torch.

        Args:
            frames: float32.
            spread: variance of a pixel over the frames, by which errors are measured.
            steps: of training.
        """
        self.train().requires_grad_(True)
        restored = (min(self.size[0], _RESTORED), min(self.size[1], _RESTORED))
        restorer, teller = _restorer(self.num_features, self.channels), nn.Linear(self.num_features, _KINDS)
        learned = [*self.parameters(), *restorer.parameters(), *teller.parameters()]
        optimizer = torch.optim.AdamW(learned, _RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps + 1, pct_start=0.1)
        for _ in range(steps):
            clean = frames[torch.randint(len(frames), (_BATCH,))]
            spoiled, harm = _spoil(clean)
            code = self._code(spoiled)
            picture = F.interpolate(restorer(code), restored, mode="bilinear", align_corners=False)
            lost = F.mse_loss(picture, F.adaptive_avg_pool2d(clean, restored)) / spread
            loss = lost + F.mse_loss(teller(code), harm) / 0.1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _whitening(codes: Tensor) -> Tensor:
    """Matrix (numbers, numbers) that turns codes (count, numbers) into features of variance below 1, nearly alike."""
    deviation = codes.std(0).clamp(min=1e-6)
    variances, directions = torch.linalg.eigh(torch.cov((codes / deviation).T).reshape(codes.shape[1], -1))
    matrix: Tensor = directions / deviation[:, None] * (variances.clamp(min=0.0) + _RIDGE).rsqrt()
    return matrix


def _restorer(num_features: int, channels: int) -> nn.Sequential:
    """From features to a picture of 32 x 32 that is then resized."""
    return nn.Sequential(
        nn.Linear(num_features, 64 * _SIDE**2),
        nn.Unflatten(1, (64, _SIDE, _SIDE)),
        nn.GELU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(64, 16 * channels, 3, padding=1),
        nn.PixelShuffle(4),
    )


def _spoil(clean: Tensor) -> tuple[Tensor, Tensor]:
    """Frames with harm of every kind, and how much of each kind, in [0, 1], (count, kinds)."""
    count = len(clean)
    harm = torch.rand(count, _KINDS) * (torch.rand(count, _KINDS) < _SHARE)
    blend, patch, contrast, blur, grain = (part.reshape(-1, 1, 1, 1) for part in harm.unbind(1))
    other = clean[torch.randperm(count)]
    frames = clean.lerp(other, 0.5 * blend)
    taken = (torch.rand(count, 1, _SIDE, _SIDE) < 0.5 * patch).float()
    frames = torch.where(F.interpolate(taken, clean.shape[-2:]) > 0.5, other, frames)
    frames = frames * (1.0 - 0.5 * contrast) + 0.5 * contrast * (2.0 * torch.rand(count, 1, 1, 1) - 1.0)
    frames = _blur(frames, blur)
    return frames + 0.5 * grain * torch.randn_like(frames), harm


def _blur(frames: Tensor, amount: Tensor) -> Tensor:
    """Frames between themselves (0), a fine blur (0.5) and a coarse one (1), whose width grows with the frame."""
    coarse = 2 * max(1, round(min(frames.shape[-2:]) / 16)) + 1
    fine, wide = (
        F.avg_pool2d(F.pad(frames, [side // 2] * 4, mode="replicate"), side, 1) for side in (3, max(coarse, 5))
    )
    return torch.where(amount < 0.5, frames.lerp(fine, 2.0 * amount), fine.lerp(wide, 2.0 * amount - 1.0))


def _check_frames(who: str, frames: Tensor) -> None:
    """Raises ValueError for what are no frames to learn from."""
    if frames.ndim != 4 or len(frames) < 2 or 0 in frames.shape:
        raise ValueError(
            f"{who}: frames have shape {list(frames.shape)}, expected (count, channels, height, width) with at least 2"
        )
    check_values(who, "frames", frames)


def check_values(who: str, name: str, pixels: Tensor) -> None:
    """Raises ValueError for values that are not finite floating point numbers of about [-1, 1]; the log tells of those
    that look like [0, 1].

    Args:
        who, name: function and argument, for the message.
        pixels: of any shape.
    """
    if not pixels.is_floating_point():
        raise ValueError(f"{who}: {name} has dtype {pixels.dtype}, expected floating point in [-1, 1]")
    if not bool(pixels.isfinite().all()):
        raise ValueError(f"{who}: {name} holds values that are not finite, expected numbers in [-1, 1]")
    if (far := float(pixels.abs().amax())) > _FAR:
        raise ValueError(f"{who}: {name} reaches {far:.4g}, expected numbers in [-1, 1]")
    tell_scale(f"{who}: no pixel of {name}", [pixels])
