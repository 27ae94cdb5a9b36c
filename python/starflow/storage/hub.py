"""Models in a folder or on the Hugging Face hub, by huggingface_hub's own mixin."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from starflow.codecs import Codec
from starflow.config import RunConfig, to_mapping
from starflow.extras import import_extra
from starflow.messages import short
from starflow.model import Flow
from starflow.storage.models import INDEX, MODEL, save_model
from starflow.storage.shipped import shipped_name
from starflow.storage.tensors import CheckpointError
from starflow.text import TextEncoder

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="Pretrained")

# Files of a model that are downloaded, and nothing else that a repository may hold.
_FILES = (MODEL, INDEX, "model-*-of-*.safetensors", "config.json")
# An id of the hub: a name, or an owner and a name.
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Pretrained(ABC):
    """What is kept in a folder or on the hub under the names that Hugging Face's libraries have made usual.

    Attributes:
        flow, config, codec, text: what a model is made of (see `starflow.storage.Loaded`).
        about: what its header says about it, such as a licence; it goes with the model.
    """

    flow: Flow
    config: RunConfig
    codec: Codec
    text: TextEncoder | None
    about: Mapping[str, str]

    @classmethod
    @abstractmethod
    def load(cls: type[Self], path: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Reads a model file, or the folder of a run."""

    @classmethod
    def from_pretrained(
        cls: type[Self],
        name: str | Path,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Reads a model from this machine or from the Hugging Face hub.

        Nothing is downloaded for a path that exists, and nothing but the files of a model otherwise.

        Args:
            name: a path or a shipped model, as for `load`, or an id of the hub ("owner/name").
            device: where the flow runs.
            revision: of the repository: a branch, a tag or a commit.
            token: of the hub, for repositories that are not public.
            cache_dir: where downloads are kept; default that of huggingface_hub.
            force_download: also what is there already.
            local_files_only: take what was downloaded before, and ask nobody.

        Raises:
            ImportError: an id of the hub, and huggingface_hub is not installed.
            CheckpointError: no such path or repository, no connection, or a file that is no model of ours.
        """
        if shipped_name(name) or Path(name).exists():
            return cls.load(name, device=device)
        if not _ID.fullmatch(str(name)):
            raise CheckpointError(
                f"checkpoint {short(name)} does not exist, expected a model file, a folder, or an id of the hub such "
                "as owner/name"
            )
        mixin = _mixin()
        try:
            found = mixin.from_pretrained(
                str(name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        # Of the connection, of the hub, of its files: errors of four libraries, by the version of huggingface_hub.
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {name} is no path here and cannot be had from the hub: {short(error)}"
            ) from error
        return cls.load(found.folder, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model, `config.json` and a model card into a folder, which `from_pretrained` and `load` read.

        The weights are in `model.safetensors`, with the whole configuration in the header; `config.json` repeats it for
        people and for the hub. A model card that is there stays.

        Args:
            folder: is made where there is none.

        Raises:
            ImportError: huggingface_hub is not installed.
            CheckpointError: something cannot be written, or the folder holds a training run, whose model would be lost.
        """
        if any((Path(folder) / "checkpoints").glob("step-*")):
            raise CheckpointError(
                f"checkpoint {folder} is the folder of a training run, whose model would be lost, expected another one"
            )
        _mixin()(self).save_pretrained(folder, config=to_mapping(self.config))

    def push_to_hub(self, name: str, **options: Any) -> str:
        """Writes the model to the Hugging Face hub, into a repository that is made where there is none.

        Args:
            name: of the repository, "owner/name".
            options: of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`, `token`, `commit_message`,
                `branch` and `create_pr`.

        Returns:
            Address of the commit.

        Raises:
            ImportError: huggingface_hub is not installed.
            CheckpointError: the model cannot be written, or the hub does not take it.
        """
        if licence := self.about.get("licence"):
            logger.warning("%s: %s", name, short(licence))
        pushed = _mixin()(self)
        try:
            return str(pushed.push_to_hub(name, config=to_mapping(self.config), **options))
        except (CheckpointError, TypeError):
            raise
        except Exception as error:  # See `from_pretrained`.
            raise CheckpointError(f"checkpoint {name} cannot be written to the hub: {short(error)}") from error


@cache
def _mixin() -> Any:
    """The files of a model as huggingface_hub's mixin has them; that library is imported where it is asked for."""
    import_extra("huggingface_hub", purpose="the Hugging Face hub", extra="hub")
    from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

    class Files(ModelHubMixin, library_name="starflow"):
        """A model to write, or the folder that one was downloaded to."""

        def __init__(self, made: Pretrained | None = None, folder: str | None = None) -> None:
            self.made, self.folder = made, folder

        def _save_pretrained(self, save_directory: Path) -> None:
            made = self.made
            assert made is not None
            save_model(save_directory / MODEL, made.flow, made.config, made.codec, made.text, about=made.about)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **where: Any) -> Files:
            return cls(folder=snapshot_download(model_id, allow_patterns=list(_FILES), **where))

        def generate_model_card(self, *_: Any, **__: Any) -> Any:
            assert self.made is not None
            return ModelCard(_card(self.made))

    return Files


def _card(made: Pretrained) -> str:
    """A model card: what the hub reads, and how the model is used."""
    data, licence = made.config.data, made.about.get("licence")
    kind = "text-to-video" if data.frames > 1 else "text-to-image"
    about = ["library_name: starflow", f"pipeline_tag: {kind}", "tags: [starflow, normalizing-flow]"]
    about += ["license: other"] if licence else []
    size = (
        f"{data.frames} frames of {data.height} x {data.width}" if data.frames > 1 else f"{data.height} x {data.width}"
    )
    lines = [
        "---",
        *about,
        "---",
        "",
        f"A normalizing flow ({size}) for [starflow](https://pypi.org/project/starflow-ext).",
        "",
        *([f"Licence: {licence}.", ""] if licence else []),
        "```python",
        "from starflow import Pipeline",
        "",
        'pipeline = Pipeline.from_pretrained("OWNER/NAME")',
        'clip = pipeline.sample("a prompt").pixels',
        "```",
        "",
    ]
    return "\n".join(lines)
