"""How is a model kept? Model files, training states, and checkpoints of the published release."""

from starflow.storage.convert import WeightDtype, convert, published_config
from starflow.storage.hub import Pretrained
from starflow.storage.models import (
    INDEX,
    MODEL,
    Header,
    Loaded,
    empty_flow,
    load_flow,
    load_model,
    model_file,
    model_files,
    read_header,
    save_model,
    write_model,
)
from starflow.storage.parts import check_parts, fingerprints
from starflow.storage.published import from_published, load_published, published_state
from starflow.storage.shipped import Card, shipped_card, shipped_name, shipped_names
from starflow.storage.states import latest_state, load_state, read_state, save_state
from starflow.storage.tensors import CheckpointError, LazyTensor, saving

__all__ = [
    "INDEX",
    "MODEL",
    "Card",
    "CheckpointError",
    "Header",
    "LazyTensor",
    "Loaded",
    "Pretrained",
    "WeightDtype",
    "check_parts",
    "convert",
    "empty_flow",
    "fingerprints",
    "from_published",
    "latest_state",
    "load_flow",
    "load_model",
    "load_published",
    "load_state",
    "model_file",
    "model_files",
    "published_config",
    "published_state",
    "read_header",
    "read_state",
    "save_model",
    "save_state",
    "saving",
    "shipped_card",
    "shipped_name",
    "shipped_names",
    "write_model",
]
