"""Game: what a model dreams under somebody's keys, beside the real world, and how surprising either is."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from starflow.arguments import check_call
from starflow.data import Clip, enlarge, to_frames, to_pixels, write_video
from starflow.evaluate import Watcher, surprise
from starflow.numeric import check_seed
from starflow.sampling import Denoise, Pipeline, Session
from starflow.worlds import PlayableWorld, check_picture, check_step, check_world, one_hot

logger = logging.getLogger(__name__)

# What a game remembers: so many moments, and so many bytes of pictures.
_MOMENTS = 3600
_BYTES = 64 << 20
# Frames of the real world that a dream begins with, at least.
_BEGINNING = 8
# A clip is enlarged until its shorter side has about so many pixels.
_CLIP_SIDE = 288


@runtime_checkable
class Rewinds(Protocol):
    """A world whose state can be read and set; it is copied, so a world may go on in the one that it gave."""

    state: Any


@runtime_checkable
class Teleports(Protocol):
    """A world that can do what its rules forbid."""

    def teleport(self, rng: np.random.Generator) -> None:
        """Puts something elsewhere."""


@dataclass(frozen=True, eq=False)
class Score:
    """How surprising a picture is, given the pictures and actions before it (see `starflow.evaluate.surprise`).

    Args:
        bits: of the picture.
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
        edited: whether it was told the truth at this frame.
        dream_score, real_score: how surprising they are, once that is known.
    """

    number: int
    action: int | None
    dream: np.ndarray
    real: np.ndarray | None
    state: Any
    past: np.ndarray
    edited: bool = False
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
        make_world: opens the real world; None for none.
        seed: of the noise, and of the world.

    Raises:
        ValueError: the world has other actions or pictures than the model, or is none; or a model of actions whose
            clips are made as a whole.
        WorldError: the world cannot be opened.

    Example:
        >>> game = Game(Pipeline.load("runs/mine"), seed=1)  # doctest: +SKIP
        >>> game.step(1).dream.shape  # doctest: +SKIP
        (24, 24, 1)
    """

    def __init__(
        self, pipeline: Pipeline, make_world: Callable[[], PlayableWorld] | None = None, *, seed: int = 0
    ) -> None:
        check_call("Game", "make_world", make_world)
        self._pipeline = pipeline
        self.temperature = pipeline.config.sample.temperature
        self.prompt = "" if pipeline.text is None else next(iter(pipeline.config.sample.prompts), "")
        dim, names = pipeline.flow.config.frame_dim, pipeline.config.data.actions or ()
        self.actions: tuple[str, ...] = names if len(names) == dim else tuple(map(str, range(dim)))
        self._denoise = self._way_of_denoising()
        self._world = None if make_world is None else make_world()
        self._moments: deque[Moment] = deque()
        self._settled: list[Moment] = []  # scored before they were asked about
        # What goes along with the moments, made when it is needed: the dream; who measures surprise, of how many rows;
        # and pictures that are decoded and not shown yet.
        self._session: Session | None = None
        self._watcher: tuple[Watcher, int] | None = None
        self._waiting: deque[np.ndarray] = deque()
        try:
            if self._world is not None:
                self._check(self._world)
                self.actions = self._world.actions
            self.new(seed)
        except BaseException:
            self.close()
            raise

    # -- what there is ------------------------------------------------------------------------------------------------

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
        return self._world is not None and not self._left_behind

    @property
    def can_teleport(self) -> bool:
        """Whether there is a real world that can do what its rules forbid."""
        return isinstance(self._world, Teleports)

    @property
    def can_measure(self) -> bool:
        """Whether surprise is known: of a model that learned with noise, and sees each picture for itself."""
        return self._pipeline.config.train.noise_std > 0 and self._pipeline.codec.temporal == 1

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
        """Begins again with another seed.

        Raises:
            ValueError: a seed that is no integer from 0 on.
            WorldError: the world failed.
        """
        check_seed("play", seed)
        self.seed, self._sessions = seed, 0
        self._rng = np.random.default_rng(seed)
        self._left_behind = self._told_the_truth = False
        self._moments.clear()
        self._settled = []
        self._scored = 0  # number of the next moment that is to be scored
        self._forget()
        if self._world is not None:
            frame = self._picture(self._world.reset(seed))
            self._remember(None, frame, frame)
            for _ in range(max(_BEGINNING, self._context) - 1):
                frame = self._real(0)
                self._remember(0, frame, frame)

    def step(self, action: int = 0) -> Moment:
        """Goes on by one frame.

        Args:
            action: index of `actions`, read by models of actions alone.

        Raises:
            ValueError: an action out of range.
            WorldError: the world failed; the moments so far are kept.
        """
        told = action if self.actions else None
        if self.actions and not 0 <= action < len(self.actions):
            raise ValueError(
                f"play: action is {action}, expected 0 to {len(self.actions) - 1} ({', '.join(self.actions)})"
            )
        if self._told_the_truth and self.has_world:
            self._settle()
        real = self._real(action) if self.has_world else None
        if real is None or not self._told_the_truth:
            return self._remember(told, self._dream(told), real)
        # From here on the model's past is the real one, this frame included.
        self._told_the_truth = False
        for moment in list(self._moments)[-self._context :]:
            moment.past = moment.past if moment.real is None else moment.real
        self._forget()
        moment = self._remember(told, real, real)
        moment.edited = True
        return moment

    def follow(self) -> None:
        """From the next frame on, the dream goes on from what the real world shows.

        Raises:
            ValueError: there is no real world.
        """
        if not self.has_world:
            raise ValueError("play: follow is asked for, expected a real world that goes along")
        self._told_the_truth = True

    def teleport(self) -> None:
        """Puts the ball elsewhere in the real world, and tells the dream so: an edit of its past.

        Raises:
            ValueError: there is no real world that can do this.
        """
        if not self.has_world or not isinstance(self._world, Teleports):
            raise ValueError("play: teleport is asked for, expected a real world that has something to put elsewhere")
        self._world.teleport(self._rng)
        self._told_the_truth = True

    def branch(self, number: int) -> None:
        """Goes back to a moment, from where another future begins; what came after it is forgotten.

        A real world whose state cannot be set is left behind: until the next game the dream goes on alone.

        Raises:
            ValueError: the moment is not remembered.
        """
        moment = self.moment(number)
        while self.last > number:
            self._moments.pop()
        self._scored = min(self._scored, number + 1)
        self._settled = [settled for settled in self._settled if settled.number <= number]
        self._told_the_truth = False
        self._forget()
        self._left_behind = self._left_behind or not self._wind_back(moment.state)

    def tell(self, prompt: str) -> None:
        """Changes what the frames to come show.

        Raises:
            ValueError: a model without text, or a prompt that its encoder refuses.
        """
        self._pipeline.condition([prompt])
        self._settle()
        self.prompt, self._watcher = prompt, None
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
        """Number of moments that were not asked about yet; 0 where surprise is not known."""
        return self.last + 1 - max(self._scored, self.first) if self.can_measure else 0

    @property
    def scored_together(self) -> int:
        """Moments that are best asked about at once: 1 where a cache goes along, else those that end a window."""
        return 1 if self._pipeline.flow.config.attention_frames is not None else self._context

    def skip_scores(self) -> None:
        """Leaves out the moments that were not asked about yet."""
        self._scored, self._watcher = self.last + 1, None

    def score(self, most: int = _MOMENTS) -> list[Moment]:
        """Finds out how surprising the moments were that were not asked about yet.

        Args:
            most: of these moments, how many are scored, the first ones.

        Returns:
            The moments that now have scores. What is asked for late has the score that it would have had before the
            model was told the truth, or another prompt.
        """
        settled, self._settled = self._settled, []
        return [*settled, *self._score(most)]

    def _settle(self) -> None:
        """Scores what was not asked about yet, before what it is scored by becomes another."""
        self._settled += self._score(_MOMENTS)

    def _score(self, most: int) -> list[Moment]:
        """The first `most` of the moments that have no scores, with these."""
        count = min(self.unscored, most)
        begin = self.last + 1 - self.unscored
        if begin != self._scored:
            self._watcher = None  # it has not seen the moments that are forgotten
        new = [self.moment(number) for number in range(begin, begin + count)]
        if new and self._pipeline.flow.config.attention_frames is not None:
            for moment in new:
                self._watch(moment)
        elif new:
            self._look_back(new)
        self._scored = begin + count
        return new

    def _watch(self, moment: Moment) -> None:
        """Scores a moment by a cache that goes along."""
        rows = 1 if moment.real is None else 2
        watcher, watched = self._watcher or (None, 0)
        if watcher is None or watched != rows:
            watcher = Watcher(self._pipeline, [self.prompt] * rows, seeds=[self.seed] * rows, scaled=True)
            self._watcher = watcher, rows
            for number in range(max(moment.number - self._context, self.first), moment.number):
                self._seen(watcher, self.moment(number), rows)
        tokens = self._seen(watcher, moment, rows)
        moment.dream_score, moment.real_score = (*map(_score, tokens), None)[:2]

    def _seen(self, watcher: Watcher, moment: Moment, rows: int) -> Tensor:
        """Shows a moment to a watcher; returns the bits of its places, (rows, height, width)."""
        pictures = [moment.past, moment.past if moment.real is None else moment.real]
        told = self._vectors([moment.action])[:, 0].expand(rows, -1) if self.actions else None
        return watcher.step(to_pixels(torch.from_numpy(np.stack(pictures[:rows]))), told).tokens

    def _look_back(self, new: Sequence[Moment]) -> None:
        """Scores moments of a model that sees windows, by the window that each few of them end."""
        for begin in range(0, len(new), self._context):
            group = new[begin : begin + self._context]
            first = max(group[0].number - self._context, self.first)
            window = [self.moment(number) for number in range(first, group[-1].number + 1)]
            kinds = [[moment.past for moment in window]]
            if all(moment.real is not None for moment in window):
                kinds.append([moment.real for moment in window if moment.real is not None])
            told = self._vectors([moment.action for moment in window])[0] if self.actions else None
            clips = [
                Clip(to_pixels(torch.from_numpy(np.stack(kind))), self.prompt, "play", frame_conditions=told)
                for kind in kinds
            ]
            tokens = [found.tokens for found in surprise(self._pipeline, clips, seed=self.seed, scaled=True)]
            for place, moment in enumerate(group, start=len(window) - len(group)):
                scores = [_score(row[place]) for row in tokens]
                moment.dream_score, moment.real_score = (*scores, None)[:2]

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

    def _way_of_denoising(self) -> Denoise | None:
        """The option of sampling by which frames are cleaned one by one, as actions need it; None is the model's own.

        Raises:
            ValueError: a model of actions whose clips do not go on.
        """
        if not self._pipeline.flow.config.frame_dim:
            return None
        session = self._pipeline.session(self.prompt)
        if not session.endless:
            raise ValueError(
                "play: the model reads actions and makes its clips as a whole, so that no key would reach them; "
                "expected a flow whose shallow blocks see one frame (flow.shallow_block_local)"
            )
        if not session.denoising.whole:
            return None
        way: Denoise = "none" if self._pipeline.flow.denoiser is None else "learned"
        logger.warning(
            "play: frames are cleaned by %r in place of %r, which needs whole clips: a key acts on the next frame%s",
            way,
            session.denoising.kind,
            " (they keep the noise of training)" if way == "none" else "",
        )
        return way

    def _check(self, world: PlayableWorld) -> None:
        check_world("play", world)
        dim = self._pipeline.flow.config.frame_dim
        if len(world.actions) != dim:
            raise ValueError(
                f"play: the world {world.name} has {len(world.actions)} actions ({', '.join(world.actions)}), expected "
                f"{dim} like the model (flow.frame_dim)"
            )
        names = self._pipeline.config.data.actions or ()
        # Numbers alone are names of a world that has none.
        if len(names) != dim or tuple(names) == tuple(world.actions) or all(name.isdecimal() for name in names):
            return
        if set(names) == set(world.actions):
            raise ValueError(
                f"play: the world {world.name} has the actions {', '.join(world.actions)}, expected them in the order "
                f"of the model: {', '.join(names)} (data.actions)"
            )
        logger.warning(
            "play: the world %s has the actions %s, and the model learned %s: each is taken for the one in its place",
            world.name,
            ", ".join(world.actions),
            ", ".join(names),
        )

    @property
    def _context(self) -> int:
        """Frames that the next one is told from."""
        flow, config = self._pipeline.flow.config, self._pipeline.config
        if flow.attention_frames is not None:
            return flow.attention_frames
        return max(1, (flow.local_attn_window or config.data.frames) * 3 // 4)

    def _real(self, action: int) -> np.ndarray:
        """The next picture of the real world."""
        assert self._world is not None
        step = check_step("play", self._world.step(action))
        return self._picture(self._world.reset() if step.done else step.frame)

    def _picture(self, frame: np.ndarray) -> np.ndarray:
        """A picture of the real world, as the page shows it beside the dream.

        Raises:
            ValueError: it is not like the model's.
        """
        data = self._pipeline.config.data
        return check_picture("play", frame, (data.height, data.width, self._pipeline.codec.channels))

    def _wind_back(self, state: Any) -> bool:
        """Sets the state of the real world; False for one whose state cannot be set."""
        if not isinstance(self._world, Rewinds) or state is None:
            return False
        try:
            self._world.state = copy.deepcopy(state)
        except AttributeError:
            return False
        return True

    def _forget(self) -> None:
        """Drops what goes along with the moments, so that it begins again with the last ones."""
        self._session = self._watcher = None
        self._waiting.clear()

    def _remember(self, action: int | None, dream: np.ndarray, real: np.ndarray | None) -> Moment:
        state = copy.deepcopy(self._world.state) if isinstance(self._world, Rewinds) else None
        moment = Moment(self.last + 1, action, dream, real, state, past=dream)
        self._moments.append(moment)
        if len(self._moments) > min(_MOMENTS, max(_BYTES // (2 * dream.nbytes), 2 * self._context)):
            self._moments.popleft()
        return moment

    def _dream(self, action: int | None) -> np.ndarray:
        """The next picture of the dream."""
        if not self._waiting:
            self._waiting.extend(to_frames(self._next_pixels(action)).numpy())
        return self._waiting.popleft()

    def _next_pixels(self, action: int | None) -> Tensor:
        """Pixels of the next frames, (frames, channels, height, width)."""
        if self._session is None:
            self._session = self._begin()
        session = self._session
        if session.denoising.whole or not session.endless:
            # A model of whole clips: one after the other.
            self._session = None
            sampled = self._pipeline.sample(self.prompt, seed=session.seeds[0], temperature=self.temperature)
            return sampled.pixels[0]
        session.temperature = self.temperature
        return session.step(action).pixels[0]

    def _begin(self) -> Session:
        """A session that goes on from the last moments."""
        # Another future: the noise of a frame is drawn by the seed and its place in the session.
        seed = self.seed + self._sessions
        self._sessions += 1
        session = self._pipeline.session(self.prompt, seed=seed, temperature=self.temperature, denoise=self._denoise)
        count = self._whole(min(len(self._moments), self._most(self._context)))
        moments = list(self._moments)[len(self._moments) - count :]
        if moments and session.endless and not session.denoising.whole:
            if self.actions:
                session.tell(self._vectors([moment.action for moment in moments]))
            past = to_pixels(torch.from_numpy(np.stack([moment.past for moment in moments])))
            session.prefill(past[None], scaled=True)
        return session

    def _most(self, latent_frames: int) -> int:
        """Pixel frames that the codec makes about so many latent frames of."""
        return self._pipeline.codec.pixel_frames(latent_frames)

    def _whole(self, frames: int) -> int:
        """The most pixel frames, up to so many, that the codec encodes; 0 where it encodes none of them."""
        for count in range(frames, 0, -1):
            try:
                self._pipeline.codec.latent_frames(count)
            except ValueError:
                continue
            return count
        return 0

    def _vectors(self, actions: Sequence[int | None]) -> Tensor:
        """Actions as the flow reads them, (1 clip, frames, frame_dim)."""
        return one_hot(actions, len(self.actions))[None].to(self._pipeline.device)


def _score(tokens: Tensor) -> Score:
    return Score(float(tokens.sum()), tokens.numpy().astype(np.float32))
