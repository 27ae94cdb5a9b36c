"""block_attention: softmax attention whose mask is a rule with parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from starflow_ext._check import (
    FLOATING,
    arithmetic_dtype,
    as_record,
    autocast_dtype,
    check_device,
    check_floating,
    check_like,
    check_tensor,
    dtype_text,
    refuse_types,
    require,
    require_first_order,
    types_of,
    without_autocast,
)
from starflow_ext._load import operators
from starflow_ext._mode import in_reference_mode
from starflow_ext._options import ATTENTION_KERNELS, CONSTANTS
from starflow_ext._spec import DOT_VARIANTS, Bound, Dtypes, Sample, Spec
from starflow_ext._stamp import is_readable

# Largest head_dim that the CUDA kernels take.
_MOST_HEAD_DIM: Final = CONSTANTS["block_attention_most_head_dim_cuda"]


# Of the numbers of a mask of frames, so that products of two do not overflow, and of positions: no tensor has so many
# keys, and what lies beyond sees what is seen there.
_MOST_OF_FRAMES: Final = 1 << 30
_AT_MOST: Final = f"at most {_MOST_OF_FRAMES}"
_FAR: Final = 1 << 40


@dataclass(frozen=True)
class FrameMask:
    """Which keys a query sees when whole frames are visible: a causal mask over frames with a look-ahead.

    Tokens are ``prefix`` always-visible ones (text) and then frames of ``frame_tokens`` each. With f the frame of a
    grid token (for a prefix query, ``(q - prefix) // frame_tokens``, negative), key k is seen by query q when k is in
    the prefix, or ``f(q) + look_ahead - 1 - window <= f(k) <= max(f(q), 0) + look_ahead - 1``.

    Args:
        prefix: number of always-visible tokens.
        frame_tokens: tokens of a frame.
        look_ahead: with 1 a query sees up to its own frame, with 2 one frame further.
        window: frames that a query sees before the furthest visible one; None is all.
    """

    prefix: int
    frame_tokens: int
    look_ahead: int
    window: int | None = None

    def __post_init__(self) -> None:
        given = (self.prefix, self.frame_tokens, self.look_ahead, self.window)
        if not all(map(isinstance, given, types_of(FrameMask))):
            refuse_types("block_attention", FrameMask, given, "frames.")
        for name, least in (("prefix", 0), ("frame_tokens", 1), ("look_ahead", 1)):
            value = getattr(self, name)
            require(value >= least, "block_attention", f"frames.{name} is", value, f"at least {least}")
        for name in ("prefix", "frame_tokens", "look_ahead", "window"):
            value = getattr(self, name)
            require(value is None or value <= _MOST_OF_FRAMES, "block_attention", f"frames.{name} is", value, _AT_MOST)
        require(
            self.window is None or self.window >= self.look_ahead - 1,
            "block_attention",
            "frames.window is",
            self.window,
            f"at least look_ahead - 1 = {self.look_ahead - 1}, so that a frame sees itself",
        )

    def runs(self, tokens: int) -> list[tuple[slice, slice]]:
        """Runs of queries that see the same grid keys: (queries, keys of the grid), the prefix being seen by all."""
        frames = (tokens - self.prefix) // self.frame_tokens
        runs = []
        for frame in range(-1 if self.prefix else 0, frames):
            behind = 0 if self.window is None else max(frame + self.look_ahead - 1 - self.window, 0)
            ahead = min(max(frame, 0) + self.look_ahead, frames)
            first = self.prefix + frame * self.frame_tokens
            queries = slice(max(first, 0) if frame >= 0 else 0, first + self.frame_tokens)
            keys = slice(self.prefix + behind * self.frame_tokens, self.prefix + ahead * self.frame_tokens)
            runs.append((queries, keys))
        return runs

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Boolean (queries, keys) for token indices ``queries`` and ``keys``."""
        frame_q = torch.div(queries - self.prefix, self.frame_tokens, rounding_mode="floor")[:, None]
        frame_k = torch.div(keys - self.prefix, self.frame_tokens, rounding_mode="floor")[None, :]
        seen = frame_k <= frame_q.clamp(min=0) + self.look_ahead - 1
        if self.window is not None:
            seen &= frame_k >= frame_q + self.look_ahead - 1 - self.window
        return seen | (keys < self.prefix)[None, :]


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | Tensor | None = None,
    k_length: int | Tensor | None = None,
    frames: FrameMask | tuple[int | None, ...] | None = None,
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | Tensor | None = None,
    k_length: int | Tensor | None = None,
    frames: FrameMask | tuple[int | None, ...] | None = None,
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | Tensor | None = None,
    k_length: int | Tensor | None = None,
    frames: FrameMask | tuple[int | None, ...] | None = None,
    scale: float | None = None,
    temperature: float | Tensor = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``softmax(q k^T / (sqrt(head_dim) * temperature)) v`` over the visible keys.

    The mask is a rule of positions and never in memory; work is proportional to what is visible. Softmax and sums are
    float32. On the CPU products are float32, or bfloat16 for bfloat16 ``q`` where the level has them, and a row's bits
    depend neither on the other rows nor on the number of threads. On CUDA devices (sm_80 and later, ``head_dim`` up to
    256) products are those of tensor cores in the dtype of ``q``, float32 as three of tf32; the keys of few queries are
    split over the device, and a row's bits depend on the number of parts. Compute capability 9.0 has a kernel of its
    own, chosen by device, dtype, ``head_dim`` and the addresses and strides of keys and values alone, and one for the
    gradient, chosen by those of the queries too (``explain`` says where they run). Float64 runs in plain torch. Under
    autocast the operands are rounded to its dtype, as by torch's own attention.

    Args:
        q: (batch, heads, queries, head_dim); float32, bfloat16, float16 or float64.
        k, v: (batch, kv_heads, keys, head_dim), rounded to the dtype of ``q``; key head j serves query heads
            ``j * r .. j * r + r - 1``.
        causal: a query sees the keys up to its own position. Default: True unless ``frames`` is given. With both, a key
            is visible where both allow it: a sliding window of frames for causal decoding.
        q_start: position of the first query among the keys, one number or one for each sample (batch,); None is
            ``keys - queries`` (the queries are the last tokens). Only with ``causal`` or ``frames``.
        k_start: first key of each sample, one number or (batch,); those before it are invisible (left padding). None
            is 0. Not with ``frames``.
        k_length: keys of each sample, one number or (batch,); those at and beyond it are invisible. None is all.
        frames: whole frames are visible, and a prefix always; a ``FrameMask``, or a plain tuple of its arguments.
        scale: multiplies the products, above 0; None is ``1 / sqrt(head_dim)``.
        temperature: divides the products, finite and above 0: one number, or one for each sample (batch,), which has a
            gradient. Numbers on a CUDA device are not looked at, since the host would wait for them.
        return_lse: also return the logarithm of the sum of the exponentials.

    Returns:
        (batch, heads, queries, head_dim), dtype of ``q``; the heads of a token lie side by side in memory. Keys and
        values that no query sees, and queries that see no key, may hold anything, NaN too. With
        ``return_lse`` also (batch, heads, queries), float32 (float64 for float64). A query that sees no key gets
        zeros, and minus infinity.

    Raises:
        RuntimeError: if types, shapes, dtypes, devices or numbers of heads do not fit, the options contradict each
            other, a temperature on the CPU is not above 0 or not finite, or the CUDA kernels do not take the
            ``head_dim``.

    Reference:
        Vaswani et al., Attention Is All You Need (2017), section 3.2; Milakov and Gimelshein, Online normalizer
        calculation for softmax (2018); Dao, FlashAttention-2 (2023); Ainslie et al., GQA (2023).
    """
    given = (q, k, v, causal, q_start, k_start, k_length, frames, scale, temperature, return_lse)
    if not all(map(isinstance, given, _TYPES)):
        refuse_types("block_attention", block_attention, given)
    mask = as_record("block_attention", "frames", frames, FrameMask) if isinstance(frames, tuple) else frames
    arguments = (q, k, v, causal, q_start, k_start, k_length, mask, scale, temperature, return_lse)
    if in_reference_mode() or _why_torch(q):
        return block_attention_reference(*arguments)
    operator, lowered = _lower(*arguments)
    out, lse = operator(*lowered)
    return (out, lse) if return_lse else out


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | None,
    q_start: int | Tensor | None,
    k_start: int | Tensor | None,
    k_length: int | Tensor | None,
    frames: FrameMask | None,
    scale: float | None,
    temperature: float | Tensor,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``block_attention`` in plain torch, by a dense mask where torch needs one; arguments as there."""
    check(q, k, v, causal, q_start, k_start, k_length, frames, scale, temperature, return_lse)
    q, k, v = _operands(q, k, v)
    causal = frames is None if causal is None else causal
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if isinstance(temperature, Tensor):
        q = q / temperature.to(q.dtype)[:, None, None, None]
    elif temperature != 1.0:
        scale = (q.shape[-1] ** -0.5 if scale is None else scale) / temperature
    if keys == 0:
        # No key is visible, yet the result must stay part of the autograd graph.
        out = (q + k.sum() + v.sum()) * 0.0
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=arithmetic_dtype(q.dtype))
        return (out, lse) if return_lse else out
    aligned = q_start is None and k_start is None and k_length is None
    if frames is not None and aligned and not causal and not return_lse:
        return _by_frame(q, k, v, frames, scale, grouped=grouped)
    whole = k_start is None and k_length is None
    square = causal and frames is None and whole and _is_square(q_start, queries, keys)
    mask = seen = None
    if not square or return_lse:
        mask = _visible(q, queries, keys, causal, q_start, k_start, k_length, frames)
    if mask is not None:
        seen = mask.any(-1, keepdim=True)
        # A weight of zero times NaN is NaN: zeros take the place of what nobody sees.
        q = torch.where(seen, q, 0.0)
        by_some = mask.any(-2)[..., None]
        k, v = torch.where(by_some, k, 0.0), torch.where(by_some, v, 0.0)
        # Softmax of a row without visible keys is undefined: such a row attends to all keys here and is set to 0 below.
        mask = mask | ~seen
    out = _attend(q, k, v, attn_mask=None if square else mask, is_causal=square, scale=scale, enable_gqa=grouped)
    if seen is not None and not square:
        out = torch.where(seen, out, 0.0)
    return (out, _log_sum(q, k, mask, seen, scale)) if return_lse else out


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Torch's attention; under transforms the formula, as its kernels have no derivative but the first."""
    if not in_reference_mode():
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


def _is_square(q_start: int | Tensor | None, queries: int, keys: int) -> bool:
    """Whether a causal mask is torch's ``is_causal``: as many queries as keys, from position 0 on."""
    return queries == keys and (q_start is None or (not isinstance(q_start, Tensor) and q_start == 0))


def _visible(
    q: Tensor,
    queries: int,
    keys: int,
    causal: bool,
    q_start: int | Tensor | None,
    k_start: int | Tensor | None,
    k_length: int | Tensor | None,
    frames: FrameMask | None,
) -> Tensor | None:
    """The mask, boolean (batch or 1, 1, queries, keys), or None where all is visible."""

    def column(value: int | Tensor) -> Tensor:
        return torch.as_tensor(value, device=q.device).reshape(-1, 1)

    key = torch.arange(keys, device=q.device)
    first = column(keys - queries if q_start is None else q_start).clamp(-_FAR, _FAR)
    position = first + torch.arange(queries, device=q.device)
    parts = []
    if causal and not (queries == 1 and q_start is None):
        parts.append(key <= position[..., None])
    if frames is not None:
        parts.append(torch.stack([frames.visible(row, key) for row in position]))
    if k_start is not None:
        parts.append(key >= column(k_start)[..., None])
    if k_length is not None:
        parts.append(key < column(k_length)[..., None])
    if not parts:
        return None
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask.expand(-1, queries, -1)[:, None]


def _log_sum(q: Tensor, k: Tensor, mask: Tensor | None, seen: Tensor | None, scale: float | None) -> Tensor:
    dtype = arithmetic_dtype(q.dtype)
    with without_autocast(q):
        keys = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1)
        products = q.to(dtype) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None or seen is None:
        return products.logsumexp(-1)
    lse = products.masked_fill(~mask, -torch.inf).logsumexp(-1)
    return torch.where(seen[..., 0], lse, -torch.inf)


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in one dtype: that of ``q``, or autocast's."""
    dtype = autocast_dtype(q) or q.dtype
    if q.dtype == k.dtype == v.dtype == dtype:
        return q, k, v
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _why_torch(q: Tensor) -> str:
    """Why a call is left to torch, or "" where it is not."""
    return "q is float64" if q.dtype == torch.float64 else ""


# What `explain` says of each AttentionKernel of csrc/ops/block_attention/block_attention_schedule.h.
_ATTENTION_KERNELS: Final = {
    "wgmma": "wgmma and TMA (sm_90a)",
    "other_device": "mma.sync, as the device is not of compute capability 9",
    "not_built": "mma.sync, as this build has no sm_90a",
    "float32": "mma.sync, as q is float32",
    "wide_head": "mma.sync, as head_dim is above 128",
    "no_keys": "mma.sync, as there are no keys",
    "unaligned": "mma.sync, as not every row of k and v starts at a multiple of 16 bytes",
    "overlapping": "mma.sync, as rows of k or v lie on top of each other",
    "no_queries": "mma.sync, as there are no queries",
    "unaligned_queries": "mma.sync, as not every row of q starts at a multiple of 16 bytes",
    "overlapping_queries": "mma.sync, as rows of q lie on top of each other",
}


def _forward_kernel(q: Tensor, k: Tensor, v: Tensor, major: int) -> str:
    """Which kernel a device of compute capability ``major`` runs, and why."""
    number = operators().block_attention_forward_kernel.default(*_operands(q, k, v), major)
    return _ATTENTION_KERNELS[ATTENTION_KERNELS[number]]


def _backward_kernel(q: Tensor, k: Tensor, v: Tensor, major: int) -> str:
    """The same of its gradient."""
    number = operators().block_attention_backward_kernel.default(*_operands(q, k, v), major)
    return _ATTENTION_KERNELS[ATTENTION_KERNELS[number]]


def _kernel(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> str:
    """Which CUDA kernels would run a call and its gradient; "" without a CUDA device, or for tensors without memory."""
    if is_fake(q) or not torch.cuda.is_available():
        return ""
    major = torch.cuda.get_device_capability(q.device)[0]
    return f"{_forward_kernel(q, k, v, major)}; the gradient by {_backward_kernel(q, k, v, major)}"


def _split(value: Any, q: Tensor) -> tuple[Any, Tensor | None]:
    """Split a value into one number for all samples and a tensor with one for each; the other is left out.

    A graph that is traced gets a tensor: a number would be a constant of it, and another one another graph.
    """
    if value is None or isinstance(value, Tensor):
        return None, value
    if torch.compiler.is_compiling() or isinstance(value, torch.SymInt):
        return None, torch.full(q.shape[:1], value, dtype=torch.int64, device=q.device)
    return value, None


def _lower(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | None,
    q_start: int | Tensor | None,
    k_start: int | Tensor | None,
    k_length: int | Tensor | None,
    frames: FrameMask | None,
    scale: float | None,
    temperature: float | Tensor,
    return_lse: bool,
) -> tuple[Any, tuple[Any, ...]]:
    """The native operator of a call and its arguments."""
    check(q, k, v, causal, q_start, k_start, k_length, frames, scale, temperature, return_lse)
    # The operator multiplies by 1 / (sqrt(head_dim) * temperature).
    if scale is not None:
        temperature = temperature / (scale * q.shape[-1] ** 0.5)
    each = isinstance(temperature, Tensor)
    window = -1 if frames is None or frames.window is None else frames.window
    return _native, (
        *_operands(q, k, v),
        frames is None if causal is None else causal,
        *_split(q_start, q),
        *_split(k_start, q),
        *_split(k_length, q),
        0 if frames is None else frames.prefix,
        0 if frames is None else frames.frame_tokens,
        0 if frames is None else frames.look_ahead,
        window,
        1.0 if each else temperature,
        temperature if each else None,
    )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool | None,
    q_start: int | Tensor | None,
    k_start: int | Tensor | None,
    k_length: int | Tensor | None,
    frames: FrameMask | None,
    scale: float | None,
    temperature: float | Tensor,
    return_lse: bool,
) -> None:
    """Raise what ``block_attention`` raises for wrong arguments; arguments as there."""
    op = "block_attention"
    if not _fit(q, k, v):
        _check_tensors(q, k, v)
    causal = frames is None if causal is None else causal
    require(q_start is None or causal or frames is not None, op, "q_start is", "given", "None without causal")
    require(k_start is None or frames is None, op, "k_start is", "given", "None with frames")
    if frames is not None and not causal and q_start is None:
        tokens, prefix = q.shape[2], frames.prefix
        require(
            k.shape[2] == tokens >= prefix and (tokens - prefix) % frames.frame_tokens == 0,
            op,
            "k has tokens",
            k.shape[2],
            tokens,
            f"like q: {prefix} of the prefix and whole frames of {frames.frame_tokens}",
        )
    for name, value in (("q_start", q_start), ("k_start", k_start), ("k_length", k_length)):
        if isinstance(value, Tensor):
            _check_by_sample(name, value, q)
            whole = not value.is_floating_point() and value.dtype != torch.bool
            require(whole, op, f"{name} has dtype", value.dtype, "an integer one")
    if isinstance(temperature, Tensor):
        _check_by_sample("temperature", temperature, q)
        check_floating(op, "temperature", temperature)
        if (
            temperature.is_cpu
            and temperature.numel()
            and not torch.compiler.is_compiling()
            and is_readable(temperature)
        ):
            # A NaN is both. In a mode of fake tensors they are fake, whatever the temperature is.
            extremes = temperature.detach().aminmax()
            for extreme in () if is_fake(extremes[0]) else map(float, extremes):
                require(0.0 < extreme < float("inf"), op, "temperature holds", extreme, "finite numbers > 0")
    else:
        require(0.0 < temperature < float("inf"), op, "temperature is", temperature, "a finite number > 0")
    require(scale is None or 0.0 < scale < float("inf"), op, "scale is", scale, "a finite number > 0")


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether tensors on the CPU fit each other, in a microsecond; where it is False, ``_check_tensors`` tells why."""
    queries, keys = q.shape, k.shape
    return (
        len(queries) == len(keys) == 4
        and keys == v.shape
        and queries[0] == keys[0]
        and queries[3] == keys[3] > 0 < keys[1]
        and queries[1] % keys[1] == 0
        and q.dtype in FLOATING
        and k.dtype in FLOATING
        and v.dtype in FLOATING
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise what is wrong with the tensors, if anything is."""
    op = "block_attention"
    named = (("q", q, "(batch, heads, queries, head_dim)"), ("k", k, "(batch, kv_heads, keys, head_dim)"))
    for name, tensor, expected in named:
        require(tensor.dim() == 4, op, f"{name} has shape", tensor.shape, expected)
    require(q.shape[-1] == k.shape[-1], op, "k has head_dim", k.shape[-1], q.shape[-1], "like q")
    require(q.shape[-1] > 0, op, "q has head_dim", 0, "at least 1")
    require(q.shape[0] == k.shape[0], op, "k has batch", k.shape[0], q.shape[0], "like q")
    require(v.shape == k.shape, op, "v has shape", v.shape, k.shape, "like k")
    divides = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    require(divides, op, "k has heads", k.shape[1], "a divisor of the", q.shape[1], "heads of q")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, tensor)
        check_device(op, name, tensor, "q", q)
    if q.is_cuda and not in_reference_mode() and not _why_torch(q):
        require(q.shape[-1] <= _MOST_HEAD_DIM, op, "q has head_dim", q.shape[-1], f"at most {_MOST_HEAD_DIM} on cuda")


def _check_by_sample(name: str, value: Tensor, q: Tensor) -> None:
    op = "block_attention"
    require(value.shape == q.shape[:1], op, f"{name} has shape", value.shape, q.shape[:1], "for batch of q")
    check_device(op, name, value, "q", q)


# The types that each argument may have.
_TYPES: Final = types_of(block_attention)


def _by_frame(q: Tensor, k: Tensor, v: Tensor, frames: FrameMask, scale: float | None, *, grouped: bool) -> Tensor:
    """Attention of each frame over its visible keys: no mask in memory, and work only for the visible part."""
    tokens, prefix = q.shape[2], frames.prefix
    out = []
    for queries, keys in frames.runs(tokens):
        if keys.start <= prefix:
            seen_k, seen_v = k[:, :, : keys.stop], v[:, :, : keys.stop]
        else:
            seen_k, seen_v = (torch.cat([t[:, :, :prefix], t[:, :, keys]], 2) for t in (k, v))
        out.append(_attend(q[:, :, queries], seen_k, seen_v, scale=scale, enable_gqa=grouped))
    return torch.cat(out, 2)


_native = operators().block_attention.default
_native_backward = operators().block_attention_backward.default


def _fake(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    return _by_token(q), q.new_empty(batch, heads, queries, dtype=torch.float32)


def _by_token(x: Tensor) -> Tensor:
    """An empty tensor like ``x``, with the heads of a token side by side in memory."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "block_attention_backward"
    check_like(op, "grad_out", grad_out, "q", q)
    check_like(op, "out", out, "q", q)
    for name, of_rows in (("lse", lse), ("grad_lse", grad_lse)):
        if of_rows is not None:
            check_tensor(op, name, of_rows, torch.float32, q.shape[:-1], "q", q)
    return _by_token(q), _by_token(k), _by_token(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    ctx.options = [None if isinstance(option, Tensor) else option for option in options]
    ctx.tensors = [index for index, option in enumerate(options) if isinstance(option, Tensor)]
    ctx.save_for_backward(q, k, v, *output, *(options[index] for index in ctx.tensors))


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    require_first_order("block_attention")
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = list(ctx.options)
    for index, tensor in zip(ctx.tensors, tensors, strict=True):
        options[index] = tensor
    grad_q, grad_k, grad_v = _native_backward(grad_out, grad_lse, q, k, v, out, lse, *options)
    others: list[Tensor | None] = [None] * len(options)
    temperatures = options[-1]
    if temperatures is not None and ctx.needs_input_grad[-1]:
        # Products are those of q / temperature: its gradient is that along q.
        along = torch.where(grad_q == 0.0, 0.0, q.float() * grad_q.float()).sum((1, 2, 3))
        others[-1] = (-along / temperatures.float()).to(temperatures.dtype)
    return (grad_q, grad_k, grad_v, *others)


torch.library.register_fake("starflow_ext::block_attention", _fake)
torch.library.register_fake("starflow_ext::block_attention_backward", _fake_backward)
torch.library.register_autograd("starflow_ext::block_attention", _backward, setup_context=_save)


def _samples(dtypes: Dtypes, generator: torch.Generator) -> Iterator[Sample]:
    (dtype,) = dtypes

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def sample(
        label: str,
        queries: int,
        keys: int,
        head_dim: int = 16,
        *,
        batch: int = 2,
        heads: int = 2,
        kv_heads: int = 2,
        **options: Any,
    ) -> Sample:
        shape = (batch, kv_heads, keys, head_dim)
        arguments = {"q": draw(batch, heads, queries, head_dim), "k": draw(*shape), "v": draw(*shape), **options}
        return Sample(label, arguments)

    yield sample("defaults", 7, 7)
    yield Sample("large", sample("", 150, 210, batch=6, return_lse=True).arguments)
    for queries, keys in ((0, 5), (5, 0), (1, 1), (1, 65), (3, 64), (64, 64), (65, 129), (5, 3)):
        # Finite differences of minus infinity are NaN: the log-sum of rows without visible keys has its own test.
        yield sample(f"{queries} queries, {keys} keys", queries, keys, return_lse=queries <= keys)
        yield sample(f"{queries} queries, {keys} keys, all visible", queries, keys, causal=False)
    yield sample("no samples", 3, 3, batch=0)
    for head_dim in (1, 17, 31, 33, 64, 80, 130, 256):
        yield sample(f"head_dim {head_dim}", 9, 70, head_dim, return_lse=True)
    for heads, kv_heads in ((4, 2), (6, 1), (3, 3), (16, 1)):
        yield sample(f"{heads} heads, {kv_heads} of keys", 21, 70, heads=heads, kv_heads=kv_heads)
    yield sample("start", 5, 90, q_start=40)
    yield sample("start of each sample", 5, 90, q_start=torch.tensor([3, 85]), return_lse=True)
    yield sample("queries before the first key", 5, 9, q_start=-3)
    yield sample("length", 5, 90, causal=False, k_length=70)
    yield sample("length of each sample", 5, 90, k_length=torch.tensor([0, 87]))
    yield sample("first key", 5, 90, k_start=70)
    yield sample("first key of each sample", 90, 90, k_start=torch.tensor([0, 87]))
    yield sample("first key, start and length", 5, 90, q_start=60, k_start=torch.tensor([63, 3]), k_length=80)
    yield sample("scale", 5, 9, scale=0.4)
    yield sample("scale and temperature of each sample", 5, 9, scale=0.4, temperature=torch.tensor([0.7, 1.5]))
    yield sample("temperature", 5, 9, temperature=0.7)
    yield sample("temperature of each sample", 5, 9, temperature=torch.tensor([0.7, 1.5]))
    for prefix, window in ((0, None), (3, None), (5, 2), (70, 1)):
        mask = FrameMask(prefix, 20, 2, window)
        tokens = prefix + 100
        yield sample(f"{mask}", tokens, tokens, frames=mask, return_lse=prefix == 5)
        yield sample(f"causal {mask}", 30, tokens, causal=True, frames=mask, q_start=torch.tensor([0, tokens - 30]))
    yield sample("frames, start and length", 50, 120, frames=FrameMask(4, 9, 1, 3), q_start=61, k_length=100)


def _case(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    **options: Any,
) -> Callable[[torch.Generator], Sample]:
    def sample(generator: torch.Generator) -> Sample:
        def draw(rows: int) -> Tensor:
            return torch.randn((batch, heads, rows, head_dim), generator=generator).to(dtype)

        label = f"[{batch}, {heads}, {queries} x {keys}, {head_dim}] {dtype_text(dtype)}"
        return Sample(label, {"q": draw(queries), "k": draw(keys), "v": draw(keys), **options})

    return sample


def _operations(sample: Sample) -> int:
    q, k = sample.arguments["q"], sample.arguments["k"]
    frames = sample.arguments.get("frames")
    causal = sample.arguments.get("causal", frames is None)
    mask = _visible(q, q.shape[2], k.shape[2], causal, None, None, None, frames)
    pairs = q.shape[2] * k.shape[2] if mask is None else int(mask.sum())
    return 4 * int(q.shape[0] * q.shape[1]) * pairs * int(q.shape[3])


_DENOISER: Final = FrameMask(prefix=0, frame_tokens=256, look_ahead=2, window=10)

SPEC = Spec(
    name="block_attention",
    call=block_attention,
    reference=block_attention_reference,
    check=check,
    dtypes=((torch.float64,), (torch.float32,), (torch.float16,), (torch.bfloat16,)),
    samples=_samples,
    # Float32 bounds cover sums of up to 256 products and weights within 2^-22. Where products take 16-bit operands,
    # weights are rounded to 8 bits (bfloat16) or 11 (float16) before the sum, which is rounded again.
    bounds={
        torch.float64: Bound(1e-12, 1e-12),
        torch.float32: Bound(4e-6, 4e-6),
        torch.float16: Bound(1e-3, 1e-3),
        torch.bfloat16: Bound(8e-3, 8e-3),
    },
    differentiable=("q", "k", "v"),
    autocast=True,
    variants=DOT_VARIANTS,
    refuses=lambda variant, q, **arguments: _why_torch(q),
    lower=_lower,
    kernel=_kernel,
    cases={
        **{
            f"window of 64, {keys} keys, {dtype_text(dtype)}": _case(1, 16, 64, keys, dtype)
            for keys in (1024, 4096, 16384)
            for dtype in (torch.float32, torch.bfloat16)
        },
        **{
            f"denoiser, {dtype_text(dtype)}": _case(1, 2, 21 * 256, 21 * 256, dtype, frames=_DENOISER)
            for dtype in (torch.float32, torch.bfloat16)
        },
        **{f"training, {tokens} tokens": _case(4, 8, tokens, tokens) for tokens in (320, 1280)},
    },
    operations=_operations,
)
