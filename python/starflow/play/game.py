"""Game: what a model dreams under somebody's keys, beside the real world, and how surprising either is."""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from starflow import noise
from starflow.data import enlarge, to_frames, to_pixels, write_video
from starflow.evaluate import noise_floor
from starflow.sampling import Pipeline, Session
from starflow.worlds import PlayableWorld, one_hot

# What a game remembers: so many moments, and so many bytes of pictures.
_MOMENTS = 3600
_BYTES = 64 << 20
# Frames of the real world that a dream begins with, at least.
_BEGINNING = 8
# A clip is enlarged until its shorter side has about so many pixels.
_CLIP_SIDE = 288

# Makes the real world of a game with a seed.
MakeWorld = Callable[[int], PlayableWorld]


@runtime_checkable
class Rewinds(Protocol):
    """A world whose state can be read and set."""

    state: Any


@runtime_checkable
class Teleports(Protocol):
    """A world that can do what its rules forbid."""

    def teleport(self, rng: np.random.Generator) -> None:
        """Puts something elsewhere."""


@dataclass(frozen=True, eq=False)
class Score:
    """How surprising a picture is, given the pictures and actions before it.

    Args:
        bits: minus log2 of its density, above what its noise alone costs on average (`starflow.evaluate.noise_floor`).
        tokens: the share of each place, float32 (height, width).
    """

    bits: float
    tokens: np.ndarray


@dataclass(eq=False)
class Moment:
    """One frame of a game.

    Args:
        number: from the game's beginning on.
        action: that led to it; None where there is none.
        dream: the picture, uint8 (height, width, channels).
        real: what the real world shows under the same actions; None without one.
        state: of the real world, to go back to it; None where it cannot be read.
        past: what the model takes for this frame when it goes on: `dream`, or `real` where it was told the truth.
        dream_score, real_score: how surprising they are, once that is known.
    """

    number: int
    action: int | None
    dream: np.ndarray
    real: np.ndarray | None
    state: Any
    past: np.ndarray
    dream_score: Score | None = None
    real_score: Score | None = None


def write_clip(frames: Tensor, fps: float) -> bytes:
    """An mp4 of frames (see `Game.frames`), enlarged for people.

    Raises:
        OSError: ffmpeg cannot write it.
    """
    enlarged = enlarge(frames, max(1, _CLIP_SIDE // frames.shape[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, enlarged, fps)
        return path.read_bytes()


class Game:
    """A dream that one plays, and can wind back.

    A model of actions dreams a frame for each; a model of text streams what its prompt says. Nothing here is
    asynchronous: a server calls one method at a time.

    Args:
        pipeline: the model.
        make_world: makes the real world; None for none.
        seed: of the noise, and of the world.

    Raises:
        ValueError: the world has other actions or pictures than the model.

    Example:
        >>> game = Game(Pipeline.load("runs/mine"), seed=1)  # doctest: +SKIP
        >>> game.step(1).dream.shape  # doctest: +SKIP
        (24, 24, 1)
    """

    def __init__(self, pipeline: Pipeline, make_world: MakeWorld | None = None, *, seed: int = 0) -> None:
        self._pipeline, self._make_world = pipeline, make_world
        self.temperature = pipeline.config.sample.temperature
        self.prompt = ""
        self._world: PlayableWorld | None = None
        self._actions = tuple(map(str, range(pipeline.flow.config.frame_dim)))
        self._moments: deque[Moment] = deque()
        self.new(seed)

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions; none for a model that reads no actions."""
        return self._actions

    @property
    def first(self) -> int:
        """Number of the first moment that is remembered."""
        return self._moments[0].number if self._moments else 0

    @property
    def last(self) -> int:
        """Number of the last moment; -1 before the first."""
        return self._moments[-1].number if self._moments else -1

    @property
    def has_world(self) -> bool:
        """Whether the real world goes along."""
        return self._world is not None

    @property
    def can_teleport(self) -> bool:
        """Whether the real world can do what its rules forbid."""
        return isinstance(self._world, Teleports)

    def moment(self, number: int) -> Moment:
        """A moment that is remembered.

        Raises:
            ValueError: it is not.
        """
        if not self.first <= number <= self.last:
            raise ValueError(f"play: frame is {number}, expected {self.first} to {self.last} (what is remembered)")
        return self._moments[number - self.first]

    # -- what one does ------------------------------------------------------------------------------------------------

    def new(self, seed: int) -> None:
        """Begins again with another seed."""
        self.close()
        self.seed, self._sessions = seed, 0
        self._rng = np.random.default_rng(seed)
        self._moments.clear()
        self._session: Session | None = None
        self._waiting: deque[np.ndarray] = deque()
        self._told_the_truth = False
        self._scored = 0  # number of the next moment that is to be scored
        if self._make_world is not None:
            self._world = world = self._make_world(seed)
            self._check(world)
            self._actions = world.actions
            self._remember(None, (frame := world.reset(seed)), frame)
            for _ in range(max(_BEGINNING, self._context) - 1):
                frame = self._real(0)
                self._remember(0, frame, frame)

    def step(self, action: int = 0) -> Moment:
        """Goes on by one frame.

        Args:
            action: index of `actions`, read by models of actions alone.

        Raises:
            ValueError: an action out of range.
        """
        told = action if self.actions else None
        if self.actions and not 0 <= action < len(self.actions):
            raise ValueError(
                f"play: action is {action}, expected 0 to {len(self.actions) - 1} ({', '.join(self.actions)})"
            )
        real = None if self._world is None else self._real(action)
        if real is not None and self._told_the_truth:
            self.score()
            for moment in list(self._moments)[-self._context :]:
                if moment.real is not None:
                    moment.past = moment.real
            self._session, self._told_the_truth = None, False
            return self._remember(told, real, real)
        return self._remember(told, self._dream(told), real)

    def follow(self) -> None:
        """From the next frame on, the dream goes on from what the real world shows.

        Raises:
            ValueError: there is no real world.
        """
        if self._world is None:
            raise ValueError("play: follow is asked for, expected a model that is played beside a real world")
        self._told_the_truth = True

    def teleport(self) -> None:
        """Puts the ball elsewhere in the real world, and tells the dream so: an edit of its past.

        Raises:
            ValueError: there is no real world, or none that can do this.
        """
        if not isinstance(self._world, Teleports):
            raise ValueError("play: teleport is asked for, expected a real world that has something to put elsewhere")
        self._world.teleport(self._rng)
        self._told_the_truth = True

    def branch(self, number: int) -> None:
        """Goes back to a moment, from where another future begins; what came after it is forgotten.

        A real world whose state cannot be set is left behind: the dream goes on alone.

        Raises:
            ValueError: the moment is not remembered.
        """
        moment = self.moment(number)
        while self.last > number:
            self._moments.pop()
        self._scored = min(self._scored, number + 1)
        self._session, self._told_the_truth = None, False
        self._waiting.clear()
        if isinstance(self._world, Rewinds) and moment.state is not None:
            self._world.state = moment.state
        elif self._world is not None and self.actions:
            self.close()

    def tell(self, prompt: str) -> None:
        """Changes what the frames to come show.

        Raises:
            ValueError: a model without text, or a prompt that its encoder refuses.
        """
        self._pipeline.condition([prompt])
        self.prompt = prompt
        if self._session is None:
            return
        try:
            self._session.change(prompt)
        except ValueError:
            # A flow whose shallow blocks read text too: a new session goes on from the last frames.
            self._session = None

    def close(self) -> None:
        """Frees the real world."""
        if self._world is not None:
            self._world.close()
            self._world = None

    # -- how surprising it was ----------------------------------------------------------------------------------------

    @property
    def unscored(self) -> int:
        """Number of moments that were not asked about yet."""
        return self.last + 1 - max(self._scored, self.first)

    def skip_scores(self) -> None:
        """Leaves out the moments that were not asked about yet."""
        self._scored = self.last + 1

    @torch.inference_mode()
    def score(self, most: int = _MOMENTS) -> list[Moment]:
        """Finds out how surprising the moments were that were not asked about yet.

        Args:
            most: of these moments, how many are scored, the last ones.

        Returns:
            The moments that now have scores.
        """
        new = list(self._moments)[-min(self.unscored, most) :] if self.unscored else []
        self.skip_scores()
        for begin in range(0, len(new), self._context + 1):
            group = new[begin : begin + self._context + 1]
            first = max(group[0].number - self._context, self.first)
            window = [self.moment(number) for number in range(first, group[-1].number + 1)]
            rows = [[moment.past for moment in window]]
            if all(moment.real is not None for moment in window):
                rows.append([moment.real for moment in window if moment.real is not None])
            tokens = self._bits(rows, window)
            for place, moment in enumerate(group, start=len(window) - len(group)):
                scores = [Score(float(row[place].sum()), row[place]) for row in tokens]
                moment.dream_score, moment.real_score = (*scores, None)[:2]
        return new

    def _bits(self, rows: Sequence[Sequence[np.ndarray]], window: Sequence[Moment]) -> np.ndarray:
        """Bits of each token above the noise's own, float32 (rows, frames, height, width)."""
        pipeline, config = self._pipeline, self._pipeline.config
        pixels = torch.stack([to_pixels(torch.from_numpy(np.stack(row))) for row in rows])
        latents = pipeline.codec.encode(pixels.to(pipeline.device))
        sigma = config.train.noise_std
        drawn = noise.draw([self.seed], *latents.shape[1:], first=window[0].number, purpose="train").to(latents)
        told = None
        if self.actions:
            told = self._vectors([moment.action for moment in window]).expand(len(rows), -1, -1)
        y = pipeline.condition([self.prompt] * len(rows))
        nats = pipeline.flow.log_prob(latents + sigma * drawn, y, told, by="token").double().cpu().numpy()
        dimensions = latents[0, 0].numel() / nats[0, 0].size
        floor = noise_floor(sigma) if sigma else 0.0
        return np.asarray(-nats / math.log(2) - dimensions * floor, dtype=np.float32)

    # -- what one keeps -----------------------------------------------------------------------------------------------

    def frames(self, first: int, last: int) -> Tensor:
        """Pictures of the moments `first` to `last` that are remembered, the real world beside the dream.

        Returns:
            uint8 (frames, height, width, channels), as `write_clip` takes it.

        Raises:
            ValueError: there is no such moment.
        """
        moments = [self.moment(number) for number in range(max(first, self.first), last + 1)]
        if not moments:
            raise ValueError("play: the clip has no frame, expected at least one between its beginning and its end")
        beside = all(moment.real is not None for moment in moments)
        pictures = []
        for moment in moments:
            parts = [moment.dream]
            if beside and moment.real is not None:
                parts += [np.full_like(moment.dream[:, :1], 128), moment.real]
            pictures.append(np.concatenate(parts, 1))
        return torch.from_numpy(np.stack(pictures))

    # -- parts --------------------------------------------------------------------------------------------------------

    def _check(self, world: PlayableWorld) -> None:
        dim = self._pipeline.flow.config.frame_dim
        if len(world.actions) != dim:
            raise ValueError(
                f"play: the world has {len(world.actions)} actions ({', '.join(world.actions)}), expected {dim} like "
                "the model (flow.frame_dim)"
            )

    @property
    def _context(self) -> int:
        """Frames that the next one is told from."""
        flow, config = self._pipeline.flow.config, self._pipeline.config
        if flow.attention_frames is not None:
            return flow.attention_frames
        window = flow.local_attn_window or self._pipeline.codec.latent_frames(config.data.frames)
        return max(1, window * 3 // 4)

    def _real(self, action: int) -> np.ndarray:
        """The next picture of the real world."""
        assert self._world is not None
        step = self._world.step(action)
        return self._world.reset() if step.done else step.frame

    def _remember(self, action: int | None, dream: np.ndarray, real: np.ndarray | None) -> Moment:
        state = self._world.state if isinstance(self._world, Rewinds) else None
        moment = Moment(self.last + 1, action, dream, real, state, past=dream)
        self._moments.append(moment)
        if len(self._moments) > min(_MOMENTS, max(_BYTES // (2 * dream.nbytes), 2 * self._context)):
            self._moments.popleft()
        return moment

    def _dream(self, action: int | None) -> np.ndarray:
        """The next picture of the dream."""
        if not self._waiting:
            if self._session is None:
                self._session = self._begin()
            self._session.temperature = self.temperature
            told = None if action is None else self._vectors([action])[:, 0]
            frames = self._session.step(None)
            self._waiting.extend(to_frames(frames.pixels[0]).numpy())
        return self._waiting.popleft()

    def _begin(self) -> Session:
        """A session that goes on from the last moments."""
        pipeline = self._pipeline
        # Another future: the noise of a frame is drawn by the seed and its place in the session.
        seed = self.seed + self._sessions
        self._sessions += 1
        session = pipeline.session(self.prompt, seed=seed, temperature=self.temperature)
        moments = list(self._moments)[-self._context :]
        if moments:
            pixels = to_pixels(torch.from_numpy(np.stack([moment.past for moment in moments])))[None]
            session.prefill(pixels)
        return session

    def _vectors(self, actions: Sequence[int | None]) -> Tensor:
        """Actions as the flow reads them, (1 clip, frames, frame_dim)."""
        return one_hot(actions, len(self.actions))[None].to(self._pipeline.device)
