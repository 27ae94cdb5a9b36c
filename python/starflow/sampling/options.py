"""SampleOptions: every option of sampling, declared once.

Signatures (`Pipeline.sample`, `Pipeline.session`), the options of `starflow sample`, their help, and the json file
beside a clip all follow from the fields here and from the docstring of the class.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from torch import Tensor

from starflow.config import LEAST_FPS, MOST_FPS, DenoiseKind
from starflow.data import CaptionMode
from starflow.messages import shown
from starflow.numeric import integer, number
from starflow.solver import Chunks, Precision, Schedule, Sequential, Window, parse_solver, solver_text

Denoise: TypeAlias = DenoiseKind
# Of `starflow.data.ASPECT_RATIOS`, or one of them drawn at random.
AspectRatio: TypeAlias = Literal["random", "1:1", "2:3", "3:2", "16:9", "9:16", "4:5", "5:4", "21:9", "9:21"]
# A picture or video: the path of a file, or its pixels.
Given: TypeAlias = str | Path | Tensor

# Actions of frames: a file or a text, numbers, or vectors.
Actions: TypeAlias = str | Path | Sequence[int | None] | Tensor

Made = TypeVar("Made", bound=Callable[..., Any])


def _shown(
    group: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    metavar: str | None = None,
) -> dict[str, Any]:
    """How a field of `SampleOptions` stands on the command line.

    Args:
        group: heading of the command's help under which the option stands.
        least, above, most: bounds of a number.
        metavar: what the command's help calls the value.
    """
    return {"group": group, "least": least, "above": above, "most": most, "metavar": metavar}


@dataclass(frozen=True, eq=False)
class SampleOptions:
    """What a sample is made of and how; all that is left out follows from the model.

    Args:
        seed: of the noise of the first clip; the next ones have seed + 1, seed + 2 and so on.
        seeds: one for each clip, in place of `seed`.
        frames: pixel frames, given ones included; by default those of the training clips. 1 makes images.
        size: height and width in pixels; by default those of the training clips.
        aspect_ratio: width to height, in place of `size`: about the area of the training clips, in the multiples of
            pixels that the model takes. "random" draws one by the first seed of a call, as published sampling does.
        fps: frames a second; by default those of the training clips.
        guidance: weight of classifier-free guidance by the prompt, 0 for none; by default the model's.
        guidance_frames: how many first frames of a clip, given ones included, are guided, where a cache rolls
            (`flow.attention_frames`); by default the model's, mostly all. Guidance piles up over the frames of a clip;
            those that it was added to are cleaned and given fresh noise before the clip goes on without it.
        guide_top: guides the deep block alone, also where shallow blocks read the prompt.
        temperature: factor of the noise that clips are made from; by default the model's. At 1 clips are draws from the
            density of the flow; below 1 they vary less and keep together better.
        image: picture that becomes the first frame: a file, or in Python a tensor ([clips,] channels, height, width)
            in [-1, 1].
        video: clip to continue: a file, or in Python a tensor ([clips,] frames, channels, height, width) in
            [-1, 1]. The new clip begins with its last `given` frames.
        given: frames taken from the end of `video`; by default as many as it has, at most half of `frames`.
        last_image: picture to end with, like `image`, alone or together with it, for a model that was trained so
            (`train.last_frame_prob`).
        source: clip to make another one of, as the prompt says, like `video`, for a model that was trained on pairs
            (`train.source_prob`): as many frames as its clips have, all of them.
        edit: clip to make again under the prompt, like `video`: from its first frame on, `frames` of it. The flow finds
            its noise and decodes that; guidance is 0 unless it is given.
        edit_prompt: what the clip of `edit` shows.
        actions: of the frames, given ones included, for a model that was trained with such (`flow.frame_dim`): a file
            of lines of JSON as `starflow record` writes it, or names with their numbers of frames ("up:12,stay"), or
            in Python a list of their numbers, or vectors ([clips,] frames, frame_dim). The first is of the first frame,
            to which nothing need have led. Frames beyond them have none.
        solver: how the flow is inverted, a schedule or its text: "window[:size[:tolerance]]" (fast, its error set by
            the tolerance, in units of a token's own scale; size "auto" fits this machine), "sequential" (token by
            token, exact, slow) or "chunks[:block[:threshold]]" (the published scheme, least exact); by default the
            model's.
        precision: how decoding stores weights and takes products (see `starflow.solver.Precision`): on the CPU float16
            and int8 read fewer bytes at float32 products, bfloat16 is fastest where the processor multiplies it and
            needs a tolerance of 0.05, two_bfloat16 lies between (for processors with AMX); on a GPU float16 and
            bfloat16 decode by native kernels; by default the model's.
        attn_temp: divides the attention logits of every block, above 1 for less sure attention.
        certificate: measures the backward error: how far the noise that these clips belong to is from the noise asked
            for, in standard deviations, at worst.
        denoise: how the noise of the training data is removed: by the "learned" denoiser, each frame with its
            neighbours alone; by the same as "published", in one pass over a window of frames when the clip has ended;
            by a step along the flow's own "score"; or "none" at all. "auto" takes the learned denoiser where the model
            has one, else the score. By default the model's, mostly "auto".
        target_noise_std: noise that captions tell (of a model whose captions do, `train.cond_noise_level`), that given
            frames get and that the score step removes; by default that of training, which is what the model saw.
        look_ahead: frames that the learned denoiser waits for before it cleans one; by default as many as it was
            trained to see. 0 shows a frame sooner, cleaned a little worse.
        window_frames: latent frames that the deep block sees of a long clip; by default those of the model's own window
            (`flow.local_attn_window`), or else of the training clips. Shallow blocks that look over time see all. A
            model whose deep block attends to the last frames alone (`flow.attention_frames`) has no windows unless this
            or one of the next three is given: its cache rolls.
        context_frames: of these, the ones that a window takes over from the one before; by default three quarters.
        sink_frames: of the context, how many are the first frames of the clip, for good.
        renew: cleans the frames that a window takes over and gives them fresh noise.

    Raises:
        ValueError: a value out of range, or two options that exclude each other; the message names them.
    """

    seed: int = field(default=0, metadata=_shown("what", least=0, metavar="N"))
    seeds: tuple[int, ...] | None = field(default=None, metadata={"least": 0})
    frames: int | None = field(default=None, metadata=_shown("what", least=1, metavar="N"))
    size: tuple[int, int] | None = field(default=None, metadata=_shown("what", least=1, metavar="HxW"))
    aspect_ratio: AspectRatio | None = field(default=None, metadata=_shown("what"))
    fps: float | None = field(default=None, metadata=_shown("what", least=LEAST_FPS, most=MOST_FPS, metavar="F"))
    guidance: float | None = field(default=None, metadata=_shown("what", least=0, metavar="W"))
    guidance_frames: int | None = field(default=None, metadata=_shown("what", least=1, metavar="N"))
    guide_top: bool = field(default=False, metadata=_shown("what"))
    temperature: float | None = field(default=None, metadata=_shown("what", least=0, metavar="T"))
    image: Given | None = field(default=None, metadata=_shown("given frames", metavar="FILE"))
    video: Given | None = field(default=None, metadata=_shown("given frames", metavar="FILE"))
    given: int | None = field(default=None, metadata=_shown("given frames", least=1, metavar="N"))
    last_image: Given | None = field(default=None, metadata=_shown("given frames", metavar="FILE"))
    source: Given | None = field(default=None, metadata=_shown("given frames", metavar="FILE"))
    edit: Given | None = field(default=None, metadata=_shown("given frames", metavar="FILE"))
    edit_prompt: str = field(default="", metadata=_shown("given frames", metavar="TEXT"))
    actions: Actions | None = field(default=None, metadata=_shown("given frames", metavar="FILE_OR_TEXT"))
    solver: str | Schedule | None = field(default=None, metadata=_shown("how", metavar="TEXT"))
    precision: Precision | None = field(default=None, metadata=_shown("how"))
    attn_temp: float = field(default=1.0, metadata=_shown("how", above=0, metavar="T"))
    certificate: bool = field(default=False, metadata=_shown("how"))
    denoise: Denoise | None = field(default=None, metadata=_shown("how"))
    target_noise_std: float | None = field(default=None, metadata=_shown("how", least=0, metavar="SIGMA"))
    look_ahead: int | None = field(default=None, metadata=_shown("how", least=0, metavar="N"))
    window_frames: int | None = field(default=None, metadata=_shown("how", least=1, metavar="N"))
    context_frames: int | None = field(default=None, metadata=_shown("how", least=1, metavar="N"))
    sink_frames: int = field(default=0, metadata=_shown("how", least=0, metavar="N"))
    renew: bool = field(default=False, metadata=_shown("how"))

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None:
                object.__setattr__(self, option.name, _checked(option, value))
        if self.seed and self.seeds is not None:
            raise ValueError(f"sample: seed is {self.seed} beside seeds, expected one of them")
        if self.size is not None and len(self.size) != 2:
            raise ValueError(f"sample: size is {self.size}, expected a height and a width")
        if self.size is not None and self.aspect_ratio is not None:
            raise ValueError("sample: size and aspect_ratio are given, expected one of them")
        if isinstance(self.solver, str):
            try:
                parse_solver(self.solver, certificate=self.certificate)
            except ValueError as error:
                raise ValueError(f"sample: {error}") from None
        elif isinstance(self.solver, Chunks) and self.certificate:
            raise ValueError(f"sample: solver is {self.solver}, expected a Window or Sequential with a certificate")
        self._check_given()

    def _check_given(self) -> None:
        """Refuses given clips that exclude each other."""
        first = [name for name in ("image", "video", "edit") if getattr(self, name) is not None]
        if len(first) > 1:
            raise ValueError(f"sample: {' and '.join(first)} are given, expected one of them")
        if self.edit is not None and (self.last_image is not None or self.source is not None):
            raise ValueError("sample: edit is given, expected no last_image or source beside it")
        if self.edit is not None and self.temperature is not None:
            raise ValueError(
                f"sample: temperature is {self.temperature}, expected None beside edit (its noise is found)"
            )
        if self.given is not None and self.video is None:
            raise ValueError(f"sample: given is {self.given}, expected video together with it")
        if self.edit_prompt and self.edit is None:
            raise ValueError(f"sample: edit_prompt is {self.edit_prompt!r}, expected edit together with it")
        if self.source is not None:
            for name in ("last_image", "window_frames", "context_frames"):
                if getattr(self, name) is not None:
                    raise ValueError(f"sample: {name} is given beside source, expected one of them")

    @property
    def mode(self) -> CaptionMode | None:
        """How captions mark the frames that stand before a clip; None for none."""
        return "last" if self.last_image is not None else "v2v" if self.source is not None else None

    def schedule(self, default: str) -> Schedule:
        """The schedule that `solver` means; without `solver`, that of the text `default`."""
        if isinstance(self.solver, str) or self.solver is None:
            return parse_solver(default if self.solver is None else self.solver, certificate=self.certificate)
        if self.certificate and isinstance(self.solver, Sequential):
            return parse_solver("sequential", certificate=True)
        if self.certificate and isinstance(self.solver, Window):
            return replace(self.solver, certificate=True)
        return self.solver

    def numbers(self, clips: int) -> tuple[int, ...]:
        """The seeds of a number of clips.

        Raises:
            ValueError: the number of `seeds` is not `clips`.
        """
        if self.seeds is None:
            return tuple(range(self.seed, self.seed + clips))
        if len(self.seeds) != clips:
            raise ValueError(f"sample: seeds has {len(self.seeds)} entries, expected {clips} like the prompts")
        return self.seeds

    def to_mapping(self) -> dict[str, Any]:
        """The options that are set, not left to the model, as plain values that json can write."""
        values = [(option, getattr(self, option.name)) for option in fields(self)]
        told = [
            (option.name, value) for option, value in values if isinstance(value, Tensor) or value != option.default
        ]
        return {name: _plain(value) for name, value in told}


def sample_options(options: SampleOptions | None, changes: dict[str, Any]) -> SampleOptions:
    """Options with some of them set anew.

    Raises:
        TypeError: a name that is no option, of which the message names the nearest one, or options of another type.
        ValueError: as of `SampleOptions`.
    """
    if not isinstance(options, SampleOptions | None):
        raise TypeError(f"sample: options is {shown(options)}, expected SampleOptions, or each option by its name")
    names = [option.name for option in fields(SampleOptions)]
    for name in changes:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise TypeError(f"sample: {name} is no option{f'; did you mean {close[0]}?' if close else ''}")
    return replace(options or SampleOptions(), **changes)


@cache
def option_help() -> dict[str, str]:
    """What the docstring of `SampleOptions` says of each option, in one line each."""
    text = inspect.cleandoc(SampleOptions.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    # Python -OO has no docstrings.
    return {option.name: "" for option in fields(SampleOptions)} | {
        name: " ".join(told.split()) for name, told in found
    }


@cache
def option_kinds() -> dict[str, tuple[Any, ...]]:
    """The types that each option may have, None left out."""
    hints = typing.get_type_hints(SampleOptions)
    kinds = {}
    for option in fields(SampleOptions):
        hint = hints[option.name]
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        kinds[option.name] = tuple(kind for kind in (get_args(hint) if union else (hint,)) if kind is not type(None))
    return kinds


def takes_options(method: Made) -> Made:
    """Gives a method of (self, prompts, options, **changes) a signature that lists every option by name."""
    hints = typing.get_type_hints(SampleOptions)
    own = [p for p in inspect.signature(method).parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = [
        inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[option.name]
        )
        for option in fields(SampleOptions)
    ]
    method.__signature__ = inspect.Signature(own + named)  # type: ignore[attr-defined]
    return method


# Types for which any list stands.
_MANY = (tuple, Sequence)


def _checked(option: Field[Any], value: Any) -> Any:
    """A value of an option in Python's own types.

    Raises:
        ValueError: of the wrong type or out of range.
    """
    kinds = option_kinds()[option.name]
    literals = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in get_args(kind)]
    if literals:
        if value not in literals:
            raise ValueError(f"sample: {option.name} is {value!r}, expected one of {', '.join(map(repr, literals))}")
        return value
    least, above = option.metadata.get("least"), option.metadata.get("above")
    if least is None and above is None:
        plain = tuple(Sequence if kind in _MANY else kind for kind in (typing.get_origin(k) or k for k in kinds))
        if not isinstance(value, plain) or isinstance(value, bytes):
            expected = ", ".join(dict.fromkeys(kind.__name__ for kind in plain))
            raise ValueError(f"sample: {option.name} is {shown(value)}, expected {expected}")
        return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    many, whole = any(typing.get_origin(kind) is tuple for kind in kinds), float not in kinds
    end: Any = above if least is None else least
    most = option.metadata.get("most") or math.inf
    bound = f">= {least:g}" if above is None else f"> {above:g}"
    bound += f" and at most {most:g}" if math.isfinite(most) else ""
    told = value if many and isinstance(value, Sequence) else (value,)
    found = tuple(integer(each) if whole else number(each) for each in told)
    fits = (
        each is not None and each < math.inf and each <= most and (each >= end if above is None else each > end)
        for each in found
    )
    if many != isinstance(value, Sequence) or not all(fits):
        kind = "integers" if many else "an integer" if whole else "a number"
        raise ValueError(f"sample: {option.name} is {shown(value)}, expected {kind} {bound}")
    return found if many else found[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, str | int | float | tuple):
        return value
    return str(value) if isinstance(value, Path) else solver_text(value)
