import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

from training.scenes.captions import complete, wording
from training.scenes.scenes import COLOURS, POSITIONS, SIZES, Scene, SceneObject, sample_scene, training_scenes
from training.scenes.text import (
    MAX_SEQUENCE_LENGTH,
    QWEN_SEQUENCE_LENGTH,
    FluxConditioner,
    QwenImageConditioner,
    build_clip_tokenizer,
    build_t5_tokenizer,
    caption_words,
    inherit,
    load_text,
    train_text,
)

LONGEST = Scene(
    objects=tuple(SceneObject("triangle", "purple", "small", place) for place in POSITIONS[:4]),
    tone="light",
    texture="striped",
    mentions_sizes=(True,) * 4,
    mentions_positions=(True,) * 4,
    mentions_background=True,
    relation=None,
    is_terse=False,
    seed=0,
)
RNG = random.Random(0)
WORDINGS = [wording(scene, RNG) for scene in training_scenes(0, 300)]
CAPTIONS = [LONGEST.caption, *(scene.caption for scene in training_scenes(0, 300)), *WORDINGS]
ODD_PROMPTS = ["", "Zebra, 3 RED circles & a hat!", "schöne Grüße 日本"]


CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
SHIPPED_TOKENIZER = CHECKPOINTS / "tiny-qwen-image" / "tokenizer"


@pytest.fixture(scope="module", autouse=True)
def _small_corpus() -> Iterator[None]:
    """A tenth of the scenes has every word; 20,000 take seconds to tokenize."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.scenes.text._NUM_CORPUS_SCENES", 2000)
        caption_words.cache_clear()
        yield
    caption_words.cache_clear()


@pytest.fixture(scope="module")
def t5_tokenizer() -> T5Tokenizer:
    return build_t5_tokenizer()


@pytest.fixture(scope="module")
def clip_tokenizer() -> CLIPTokenizer:
    return build_clip_tokenizer()


def test_each_word_of_a_caption_is_one_t5_token(t5_tokenizer: T5Tokenizer) -> None:
    for caption in CAPTIONS:
        words = [token.strip("\u2581.,") for token in t5_tokenizer.tokenize(caption)]
        assert list(filter(None, words)) == re.findall(r"\w+", caption)
        ids = t5_tokenizer(caption).input_ids
        assert t5_tokenizer.unk_token_id not in ids
        assert t5_tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_unknown_words_are_tokenized(t5_tokenizer: T5Tokenizer, clip_tokenizer: CLIPTokenizer) -> None:
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


def test_captions_of_three_objects_fit_clip(clip_tokenizer: CLIPTokenizer) -> None:
    captions = [sample_scene(seed, num_objects=3, mentions_all=True).caption for seed in range(200)]
    assert max(len(clip_tokenizer(caption).input_ids) for caption in captions) <= clip_tokenizer.model_max_length


def test_each_word_of_a_caption_is_one_clip_token(clip_tokenizer: CLIPTokenizer) -> None:
    for caption in CAPTIONS:
        tokens = [token.removesuffix("</w>") for token in clip_tokenizer.tokenize(caption)]
        assert tokens == re.findall(r"\w+|[,.]", caption.lower())


@pytest.fixture(scope="module")
def conditioner() -> QwenImageConditioner:
    conditioner = QwenImageConditioner.new()
    conditioner.encoder.eval().requires_grad_(False)
    return conditioner


@pytest.fixture(params=["built", "shipped"])
def qwen_tokenizer(request: pytest.FixtureRequest, conditioner: QwenImageConditioner) -> Qwen2Tokenizer:
    return conditioner.tokenizer if request.param == "built" else Qwen2Tokenizer.from_pretrained(SHIPPED_TOKENIZER)


def prompt_tokens(tokenizer: Qwen2Tokenizer, template: str, prompt: str) -> list[str]:
    """The tokens of the prompt alone, at its place in the template."""
    start, end = (len(tokenizer(piece).input_ids) for piece in template.split("{}"))
    tokens: list[str] = tokenizer.tokenize(template.format(prompt))
    return tokens[start:-end]


def test_each_word_is_one_qwen_token(qwen_tokenizer: Qwen2Tokenizer, conditioner: QwenImageConditioner) -> None:
    rng = random.Random(1)
    scenes = list(training_scenes(10**6, 200))
    fragments = [scene.fragment(rng) for scene in scenes]
    for prompt in [
        LONGEST.long_caption,
        *fragments,
        *(caption for s in scenes for caption in (s.caption, s.long_caption)),
    ]:
        tokens = prompt_tokens(qwen_tokenizer, conditioner.template, prompt)
        assert [token.strip("Ġ") for token in tokens] == re.findall(r"\w+|[,.]", prompt)


def test_template_starts_with_the_tokens_that_the_pipeline_cuts_off(conditioner: QwenImageConditioner) -> None:
    beginning = conditioner.template.split("{}")[0]
    assert len(conditioner.tokenizer(beginning).input_ids) == conditioner.start == 34


def test_longest_long_caption_and_the_templates_end_fit_qwen(conditioner: QwenImageConditioner) -> None:
    longest = max((replace(LONGEST, seed=seed).long_caption for seed in range(200)), key=lambda text: len(text.split()))
    lengths = [len(conditioner.tokenizer(conditioner.template.format(text)).input_ids) for text in (longest, "")]
    assert lengths[0] == 34 + QWEN_SEQUENCE_LENGTH == conditioner.tokenizer.model_max_length
    assert lengths[1] == 34 + 5


def test_unknown_words_are_qwen_tokens(conditioner: QwenImageConditioner) -> None:
    tokenizer = conditioner.tokenizer
    for prompt in ODD_PROMPTS:
        assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    assert len(tokenizer("a zebra").input_ids) > 2


def test_qwen_tokenizer_survives_a_round_trip(conditioner: QwenImageConditioner, tmp_path: Path) -> None:
    conditioner.tokenizer.save_pretrained(tmp_path)
    loaded = Qwen2Tokenizer.from_pretrained(tmp_path)
    prompts = [conditioner.template.format(prompt) for prompt in CAPTIONS + ODD_PROMPTS]
    assert loaded(prompts).input_ids == conditioner.tokenizer(prompts).input_ids
    assert loaded.model_max_length == conditioner.tokenizer.model_max_length


def test_qwen_conditioner_encodes_like_the_pipeline(conditioner: QwenImageConditioner) -> None:
    pipeline = QwenImagePipeline(None, None, conditioner.encoder, conditioner.tokenizer, None)
    prompts = ["", "a red circle", LONGEST.long_caption]
    condition = conditioner.encode(prompts)
    assert condition.pooled is None
    assert condition.mask is not None
    assert condition.embeds.shape == (3, QWEN_SEQUENCE_LENGTH, 128)
    for embeds, mask, prompt in zip(condition.embeds, condition.mask, prompts, strict=True):
        expected, _ = pipeline.encode_prompt(
            prompt, device=torch.device("cpu"), max_sequence_length=QWEN_SEQUENCE_LENGTH
        )
        assert mask.tolist() == [i < expected.shape[1] for i in range(QWEN_SEQUENCE_LENGTH)]
        torch.testing.assert_close(embeds[mask], expected[0], rtol=1e-4, atol=1e-4)


def test_qwen_image_gets_long_and_short_captions(conditioner: QwenImageConditioner) -> None:
    scenes = list(training_scenes(0, 30))
    assert [conditioner.caption(scene) for scene in scenes] == [scene.mixed_caption for scene in scenes]


@pytest.mark.parametrize("family", [FluxConditioner, QwenImageConditioner])
def test_encoders_with_a_larger_vocabulary_read_known_words_as_their_teacher_does(
    family: type[FluxConditioner | QwenImageConditioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a teacher with a small vocabulary and random weights
    with monkeypatch.context() as patch:
        patch.setattr("training.scenes.text.wording", lambda scene, rng: scene.caption)
        caption_words.cache_clear()
        teacher = family.new()
    caption_words.cache_clear()
    conditioner = family.new()
    name = next(iter(teacher.encoders))  # CLIP is left out: its tokens for parts of words differ
    for parameter in teacher.encoders[name].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    # When the encoders inherit its weights
    inherit(conditioner, teacher)
    # Then the teacher's words have its embeddings, new forms of a word those of the word
    old, new = (c.tokenizers[name].get_vocab() for c in (teacher, conditioner))
    assert len(new) > len(old)
    captions = [scene.caption for scene in training_scenes(0, 8)]
    torch.testing.assert_close(conditioner.encode(captions).embeds, teacher.encode(captions).embeds)
    embeddings = conditioner.encoders[name].get_input_embeddings().weight
    capitals = {word.capitalize() for word in (*COLOURS, *SIZES)}
    capital = next(token for token in new if token.strip("\u2581") in capitals)
    word = next(token for token in (capital.lower(), f"\u0120{capital.lower()}") if token in old)
    torch.testing.assert_close(embeddings[new[capital]], embeddings[new[word]])


def test_trained_encoders_stay_near_their_teacher(tmp_path: Path) -> None:
    """So a transformer that was trained with the teacher understands them."""
    teacher = FluxConditioner.load(CHECKPOINTS / "tiny-flux")
    conditioner = FluxConditioner.new()
    captions = [complete(scene).caption for scene in training_scenes(10**6, 16)]
    train_text(conditioner, tmp_path, num_steps=2, teacher=teacher, batch_size=4)
    near = (conditioner.encode(captions).embeds - teacher.encode(captions).embeds).square().mean()
    assert near < 0.01 * teacher.encode(captions).embeds.square().mean()
    load_text(conditioner, tmp_path)
    assert not any(parameter.requires_grad for parameter in conditioner.t5.parameters())
