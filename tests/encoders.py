"""The smallest text encoder that lies in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def make_t5(folder: Path, seed: int = 0, animals: tuple[str, str] = ("cat", "dog"), **sizes: int) -> Path:
    """Writes a T5 that knows "a" and two animals; the seed decides its weights alone, `sizes` replace its own."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", "a", *animals))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, **sizes}
    config = transformers.T5Config(vocab_size=8, **sizes)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder
