"""Tokenizers and text encoders of the tiny image models: T5 and CLIP for FLUX, Qwen2.5-VL for Qwen-Image.

The encoders learn to tell from a caption which object is where. So they bind the words of one object together before
the diffusion transformer reads them. The transformer would need the longest time to learn that.
"""

import random
import string
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from diffusers import QwenImagePipeline
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
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


@cache
def caption_words() -> tuple[str, ...]:
    """All words of the captions, sorted. A word followed by a comma is listed with the comma."""
    words = {word for scene in training_scenes(0, _NUM_CORPUS_SCENES) for word in scene.caption.split()}
    return tuple(sorted(words))


def build_t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: each word of a caption is one token; other words become characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in caption_words()]
    pieces += [(char, -8.0) for char in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges build the words of the captions, shorter merges first.

    Some words stay several tokens, and the longest captions exceed the model's length. As in FLUX itself, the pooled
    embedding covers the beginning of a prompt, and T5 reads the whole prompt.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [f"{char}</w>" for char in alphabet]
    merges: list[tuple[str, str]] = []
    for word in sorted({word.strip(",") for word in caption_words()}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    merges = list(dict.fromkeys(sorted(merges, key=lambda pair: len(pair[0]))))
    symbols += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_SEQUENCE_LENGTH)


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
    """Tokenizers and text encoders of one family, called as its pipeline calls them."""

    encoders: Mapping[str, nn.Module]

    def caption(self, scene: Scene) -> str:
        """The scene's caption in this family's wording."""
        ...

    def encode(self, prompts: Sequence[str]) -> Condition: ...


class FluxConditioner:
    """T5 and CLIP. Prompts are padded and not masked."""

    def __init__(self) -> None:
        self.t5_tokenizer = build_t5_tokenizer()
        self.clip_tokenizer = build_clip_tokenizer()
        self.t5 = build_t5(len(self.t5_tokenizer))
        self.clip = build_clip(self.clip_tokenizer)
        self.encoders: Mapping[str, nn.Module] = {"t5": self.t5, "clip": self.clip}

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

    def __init__(self) -> None:
        # The pipeline's constructor sets the template and needs no models for that.
        template = QwenImagePipeline(None, None, None, None, None)
        self.template, self.start = template.prompt_template_encode, template.prompt_template_encode_start_idx
        self.tokenizer = build_qwen_tokenizer(self.template)
        self.encoder = build_qwen(len(self.tokenizer))
        self.encoders: Mapping[str, nn.Module] = {"qwen": self.encoder}

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


def build_qwen_tokenizer(template: str) -> Qwen2Tokenizer:
    """Byte-level BPE trained on captions in the template until each of their words is one token.

    The start of the template then has exactly the 34 tokens that the pipeline cuts off.
    """

    def corpus() -> Iterator[str]:
        rng = random.Random(0)
        for scene in training_scenes(0, _NUM_CORPUS_SCENES):
            for words in (scene.caption, scene.long_caption, scene.fragment(rng)):
                yield template.format(words)

    blank = Qwen2Tokenizer(
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=34 + QWEN_SEQUENCE_LENGTH
    )
    return blank.train_new_from_iterator(corpus(), vocab_size=2000, show_progress=False)


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


def train_text(conditioner: Conditioner, run_dir: Path, *, num_steps: int, batch_size: int = 128) -> None:
    """Train, or resume, all encoders together, to tell the attributes of the scenes that captions describe."""
    torch.manual_seed(3)
    reader = _CaptionReader(128)
    modules: dict[str, nn.Module] = {**conditioner.encoders, "reader": reader}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=50, hold=0.5, end=0.02)
    scheduled = ScheduledOptimizers([optimizer], schedule)

    def loss_of(first: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        scenes = [sample_scene(i, held_out=held_out) for i in range(first, first + batch_size)]
        condition = conditioner.encode([conditioner.caption(scene) for scene in scenes])
        result: tuple[Tensor, Tensor] = reader(condition, attribute_targets(scenes))
        return result

    def train_step(step: int) -> dict[str, float]:
        with autocast():
            loss, accuracy = loss_of(step * batch_size)
        scheduled.minimise(loss, step)
        return {"loss": loss.item(), "read": float(accuracy)}

    @torch.no_grad()
    def look(step: int) -> None:
        print(f"  step {step}: {float(loss_of(10**8, held_out=True)[1]):.4f} of held-out attributes read", flush=True)

    state: dict[str, Stateful] = {**modules, "optimizer": optimizer}
    run_loop("text encoders", num_steps, train_step, state, run_dir / "text.pt", save_every=200, look=look)


def load_text(conditioner: Conditioner, run_dir: Path) -> None:
    """Load the trained weights into `conditioner` and set it to evaluation mode."""
    saved = torch.load(run_dir / "text.pt", weights_only=True)
    for name, encoder in conditioner.encoders.items():
        encoder.load_state_dict(saved[name])
        encoder.eval().requires_grad_(False)
