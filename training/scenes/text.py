"""Tokenizers and text encoders of the tiny image models: T5 and CLIP for FLUX, Qwen2.5-VL for Qwen-Image.

The encoders learn to tell from a caption which object is where. So they bind the words of one object together before
the diffusion transformer reads them. The transformer would need the longest time to learn that.
"""

import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from training.lesson import Condition
from training.loop import Stateful, run_loop
from training.optimizers import ScheduledOptimizers, warm_then_linear
from training.precision import autocast
from training.scenes.captions import captioned_scene, complete, draw_caption, wording
from training.scenes.rendering import attribute_targets
from training.scenes.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    TONES,
    Scene,
    sample_scene,
    training_scenes,
)

MAX_SEQUENCE_LENGTH = 40
"""Tokens of FLUX's prompts."""
QWEN_SEQUENCE_LENGTH = 56
"""Tokens of Qwen-Image's prompts: the longest caption and the end of the template."""
_NUM_CORPUS_SCENES = 20_000
"""Scenes whose captions determine the vocabularies."""
# The number of predictions and of classes for each attribute.
_CLASSES = {
    "shape": (len(POSITIONS), len(SHAPES) + 1),
    "colour": (len(POSITIONS), len(COLOURS)),
    "size": (len(POSITIONS), len(SIZES)),
    "tone": (1, len(TONES)),
    "texture": (1, len(TEXTURES)),
}


def corpus() -> Iterator[str]:
    """Captions in every wording and fragments of captions; they determine the vocabularies."""
    rng = random.Random(0)
    for scene in training_scenes(0, _NUM_CORPUS_SCENES):
        whole = complete(scene)
        yield from (whole.caption, scene.caption, whole.long_caption, wording(scene, rng), scene.fragment(rng))


@cache
def caption_words() -> tuple[str, ...]:
    """All words of the corpus, sorted. A word followed by a comma or full stop is listed with it."""
    return tuple(sorted({word for text in corpus() for word in text.split()}))


def build_t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: each word of a caption is one token; other words become characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in caption_words()]
    pieces += [(char, -8.0) for char in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE trained on captions until each of their words is one token.

    The longest captions exceed the model's length. As in FLUX itself, the pooled embedding covers the beginning of a
    prompt, and T5 reads the whole prompt.
    """
    blank = CLIPTokenizer(model_max_length=MAX_SEQUENCE_LENGTH)
    return blank.train_new_from_iterator(corpus(), vocab_size=2000, show_progress=False)


def build_t5(vocab_size: int) -> T5EncoderModel:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


class Conditioner(Protocol):
    """Tokenizers and text encoders of one family, called as its pipeline calls them.

    An encoder and its tokenizer have the same name.
    """

    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    encoders: Mapping[str, PreTrainedModel]

    def caption(self, scene: Scene) -> str:
        """The scene's caption in this family's wording."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition: ...


class FluxConditioner:
    """T5 and CLIP. Prompts are padded and not masked."""

    def __init__(
        self, t5_tokenizer: T5Tokenizer, clip_tokenizer: CLIPTokenizer, t5: T5EncoderModel, clip: CLIPTextModel
    ) -> None:
        self.t5_tokenizer, self.clip_tokenizer, self.t5, self.clip = t5_tokenizer, clip_tokenizer, t5, clip
        self.tokenizers: Mapping[str, PreTrainedTokenizerBase] = {"t5": t5_tokenizer, "clip": clip_tokenizer}
        self.encoders: Mapping[str, PreTrainedModel] = {"t5": t5, "clip": clip}

    @classmethod
    def new(cls) -> "FluxConditioner":
        t5_tokenizer, clip_tokenizer = build_t5_tokenizer(), build_clip_tokenizer()
        return cls(t5_tokenizer, clip_tokenizer, build_t5(len(t5_tokenizer)), build_clip(clip_tokenizer))

    @classmethod
    def load(cls, checkpoint: Path) -> "FluxConditioner":
        return cls(
            T5Tokenizer.from_pretrained(checkpoint / "tokenizer_2"),
            CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
            T5EncoderModel.from_pretrained(checkpoint / "text_encoder_2"),
            CLIPTextModel.from_pretrained(checkpoint / "text_encoder"),
        )

    def caption(self, scene: Scene) -> str:
        return scene.caption

    def encode(self, prompts: Sequence[str]) -> Condition:
        t5_ids = _token_ids(self.t5_tokenizer, prompts)
        clip_ids = _token_ids(self.clip_tokenizer, prompts)
        return Condition(self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output, None)


def _token_ids(tokenizer: T5Tokenizer | CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


class QwenImageConditioner:
    """Qwen2.5-VL in the chat template of QwenImagePipeline. The template's start is cut off, padding is masked."""

    def __init__(self, tokenizer: Qwen2Tokenizer, encoder: Qwen2_5_VLForConditionalGeneration) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self.template, self.start = _qwen_template()
        self.tokenizers: Mapping[str, PreTrainedTokenizerBase] = {"qwen": tokenizer}
        self.encoders: Mapping[str, PreTrainedModel] = {"qwen": encoder}

    @classmethod
    def new(cls) -> "QwenImageConditioner":
        tokenizer = build_qwen_tokenizer(_qwen_template()[0])
        return cls(tokenizer, build_qwen(len(tokenizer)))

    @classmethod
    def load(cls, checkpoint: Path) -> "QwenImageConditioner":
        return cls(
            Qwen2Tokenizer.from_pretrained(checkpoint / "tokenizer"),
            Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint / "text_encoder"),
        )

    def caption(self, scene: Scene) -> str:
        return scene.mixed_caption

    def encode(self, prompts: Sequence[str]) -> Condition:
        tokens = self.tokenizer(
            [self.template.format(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.start + QWEN_SEQUENCE_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask
        hidden = self.encoder.model(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state
        return Condition(hidden[:, self.start :], None, mask[:, self.start :].bool())


def _qwen_template() -> tuple[str, int]:
    """The pipeline's chat template, and the number of tokens that it cuts off."""
    pipeline = QwenImagePipeline(None, None, None, None, None)  # its constructor needs no models to set them
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx


def build_qwen_tokenizer(template: str) -> Qwen2Tokenizer:
    """Byte-level BPE trained on captions in the template until each of their words is one token.

    The start of the template then has exactly the 34 tokens that the pipeline cuts off.
    """
    blank = Qwen2Tokenizer(
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=34 + QWEN_SEQUENCE_LENGTH
    )
    return blank.train_new_from_iterator(map(template.format, corpus()), vocab_size=2000, show_progress=False)


def build_qwen(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    """A small language model. No prompt uses the vision half, so it is as small as the class allows, and zero."""
    torch.manual_seed(1)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    for parameter in encoder.model.visual.parameters():
        nn.init.zeros_(parameter)
    return encoder


class _CaptionReader(nn.Module):
    """Predicts a scene's attributes from the encoders' outputs. Discarded after training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(POSITIONS) + 1, dim) * 0.5)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.from_tokens = nn.ModuleDict({k: nn.Linear(dim, c) for k, (_, c) in _CLASSES.items()})
        self.from_pooled = nn.ModuleDict({k: nn.Linear(dim, p * c) for k, (p, c) in _CLASSES.items()})

    def forward(self, condition: Condition, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the loss and the share of attributes that are predicted correctly from the tokens."""
        tokens = condition.embeds
        queries = self.queries.expand(len(tokens), -1, -1)
        padding = None if condition.mask is None else ~condition.mask
        read, _ = self.attention(queries, tokens, tokens, key_padding_mask=padding, need_weights=False)
        loss, right, count = tokens.new_zeros(()), 0.0, 0.0
        for key, (places, classes) in _CLASSES.items():
            rows = read[:, :places] if places > 1 else read[:, -1:]
            logits = self.from_tokens[key](rows).float().flatten(0, 1)
            target = targets[key].flatten()
            loss = loss + F.cross_entropy(logits, target)
            if condition.pooled is not None:
                from_pooled = self.from_pooled[key](condition.pooled).float().view(-1, classes)
                loss = loss + F.cross_entropy(from_pooled, target)
            known = target >= 0
            right += float((logits.argmax(-1) == target)[known].sum())
            count += float(known.sum())
        return loss, torch.tensor(right / count)


def inherit(conditioner: Conditioner, teacher: Conditioner) -> None:
    """Copy the weights of the teacher's encoders. The rows of the vocabularies are matched by their tokens.

    A token that the teacher lacks gets the row of the same word without capitals and punctuation, if there is one.
    """
    for name, encoder in conditioner.encoders.items():
        old = teacher.encoders[name].get_input_embeddings().weight
        table = encoder.get_input_embeddings().weight.detach().clone()
        old_rows = teacher.tokenizers[name].get_vocab()
        for token, row in conditioner.tokenizers[name].get_vocab().items():
            relatives = (token, re.sub(r"(?<=\w)[.,]$", "", token).lower(), f"\u0120{token.lower()}")
            known = next((old_rows[other] for other in relatives if other in old_rows), None)
            if known is not None:
                table[row] = old[known].detach()
        weights = teacher.encoders[name].state_dict()
        encoder.load_state_dict({k: table if v.data_ptr() == old.data_ptr() else v for k, v in weights.items()})


def train_text(
    conditioner: Conditioner,
    run_dir: Path,
    *,
    num_steps: int,
    teacher: Conditioner | None = None,
    batch_size: int = 64,
) -> None:
    """Train, or resume, all encoders together, to tell the attributes of the scenes that captions describe.

    With a `teacher`, they begin with its weights and stay near its outputs for complete captions in its wording. A
    transformer that was trained with the teacher then understands them at once.
    """
    torch.manual_seed(3)
    if teacher:
        inherit(conditioner, teacher)
    reader = _CaptionReader(128)
    modules: dict[str, nn.Module] = {**conditioner.encoders, "reader": reader}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=50, hold=0.5, end=0.02)
    scheduled = ScheduledOptimizers([optimizer], schedule)

    def train_step(step: int) -> dict[str, float]:
        rng = random.Random(step)
        scenes = [captioned_scene(step * batch_size + i) for i in range(batch_size)]
        prompts = [
            scene.fragment(rng) if rng.random() < 0.08 else draw_caption(scene, rng, conditioner.caption)
            for scene in scenes
        ]
        known = [conditioner.caption(complete(scene)) for scene in scenes[: batch_size // 4]] if teacher else []
        with autocast():
            condition = conditioner.encode(prompts + known)
            loss, accuracy = reader(condition.rows(slice(batch_size)), attribute_targets(scenes))
            if teacher:
                with torch.no_grad():
                    wanted = teacher.encode(known)
                loss = loss + 10 * _distance(condition.rows(slice(batch_size, None)), wanted)
        scheduled.minimise(loss, step)
        return {"loss": loss.item(), "read": float(accuracy)}

    held_out = [complete(sample_scene(10**8 + i, held_out=True)) for i in range(batch_size)]
    words = [wording(scene, random.Random(scene.seed)) for scene in held_out]

    @torch.no_grad()
    def look(step: int) -> None:
        accuracy = reader(conditioner.encode(words), attribute_targets(held_out))[1]
        print(f"  step {step}: {float(accuracy):.4f} of the attributes in held-out captions read", flush=True)

    state: dict[str, Stateful] = {**modules, "optimizer": optimizer}
    run_loop("text encoders", num_steps, train_step, state, run_dir / "text.pt", save_every=100, look=look)


def _distance(condition: Condition, other: Condition) -> Tensor:
    """The squared difference of two encodings, relative to the size of the other one."""
    pairs = [(condition.embeds, other.embeds)]
    if condition.mask is not None:
        pairs = [(condition.embeds[condition.mask], other.embeds[condition.mask])]
    if condition.pooled is not None and other.pooled is not None:
        pairs.append((condition.pooled, other.pooled))
    return torch.stack([F.mse_loss(mine, known) / known.square().mean() for mine, known in pairs]).sum()


def load_text(conditioner: Conditioner, run_dir: Path) -> None:
    """Load the trained weights into `conditioner` and set it to evaluation mode."""
    saved = torch.load(run_dir / "text.pt", weights_only=True)
    for name, encoder in conditioner.encoders.items():
        encoder.load_state_dict(saved[name])
        encoder.eval().requires_grad_(False)
