from pathlib import Path

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from training.scenes import POSITIONS, Scene, SceneObject, sample_scene, training_scenes
from training.text import MAX_SEQUENCE_LENGTH, build_clip_tokenizer, build_t5_tokenizer

LONGEST = Scene(
    objects=tuple(SceneObject("triangle", "purple", "small", place) for place in POSITIONS[:4]),
    tone="light",
    texture="striped",
    told_sizes=(True,) * 4,
    told_positions=(True,) * 4,
    tells_background=True,
    relation=None,
    is_terse=False,
    seed=0,
)
CAPTIONS = [LONGEST.caption, *(scene.caption for scene in training_scenes(0, 300))]
ODD_PROMPTS = ["", "Zebra, 3 RED circles & a hat!", "schöne Grüße 日本"]


@pytest.fixture(scope="module")
def t5_tokenizer() -> T5Tokenizer:
    return build_t5_tokenizer()


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return build_clip_tokenizer()


def test_each_word_of_a_caption_is_one_t5_token(t5_tokenizer: T5Tokenizer) -> None:
    for caption in CAPTIONS:
        ids = t5_tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1  # and the end
        assert t5_tokenizer.unk_token_id not in ids
        assert t5_tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_unknown_words_are_tokenized_too(t5_tokenizer: T5Tokenizer, clip_tokenizer: CLIPTokenizer) -> None:
    for tokenizer in (t5_tokenizer, clip_tokenizer):
        assert len(tokenizer("a zebra").input_ids) > 3


def test_t5_tokenizer_survives_a_round_trip(t5_tokenizer: T5Tokenizer, tmp_path: Path) -> None:
    t5_tokenizer.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path)
    assert loaded(CAPTIONS + ODD_PROMPTS).input_ids == t5_tokenizer(CAPTIONS + ODD_PROMPTS).input_ids
    assert loaded.model_max_length == t5_tokenizer.model_max_length


def test_clip_tokenizer_survives_a_round_trip(clip_tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    clip_tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded(CAPTIONS + ODD_PROMPTS).input_ids == clip_tokenizer(CAPTIONS + ODD_PROMPTS).input_ids
    assert loaded.model_max_length == clip_tokenizer.model_max_length


def test_longest_caption_fits_t5(t5_tokenizer: T5Tokenizer) -> None:
    assert len(t5_tokenizer(LONGEST.caption).input_ids) <= MAX_SEQUENCE_LENGTH


def test_captions_of_one_object_fit_clip(clip_tokenizer: CLIPTokenizer) -> None:
    captions = [sample_scene(seed, num_objects=1, tells_all=True).caption for seed in range(200)]
    assert max(len(clip_tokenizer(caption).input_ids) for caption in captions) <= clip_tokenizer.model_max_length


def test_clip_tokens_spell_the_caption(clip_tokenizer: CLIPTokenizer) -> None:
    for caption in CAPTIONS:
        tokens = "".join(clip_tokenizer.tokenize(caption))
        assert tokens.replace("</w>", " ").split() == caption.replace(",", " ,").split()
