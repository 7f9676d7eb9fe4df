"""Tokenizers and text encoders of the tiny picture models: a T5 encoder and a CLIP text model, both trained here.

They learn to tell from a caption what stands where. So the words of one object are bound together before the diffusion
transformer sees them, which is what it would take longest to find out.
"""

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from training.loop import Stateful, run_loop, warm_then_linear
from training.rendering import attribute_targets
from training.scenes import COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, TONES, sample_scene, training_scenes

MAX_SEQUENCE_LENGTH = 40
NUM_STEPS = 1200
_CLASSES = {
    "shape": (len(POSITIONS), len(SHAPES) + 1),
    "colour": (len(POSITIONS), len(COLOURS)),
    "size": (len(POSITIONS), len(SIZES)),
    "tone": (1, len(TONES)),
    "texture": (1, len(TEXTURES)),
}


def caption_words() -> list[str]:
    """Every word, with a trailing comma where one occurs, of the captions. Sorted."""
    return sorted({word for scene in training_scenes(0, 20_000) for word in scene.caption.split()})


def build_t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: a caption word is one token, anything else falls apart into characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in caption_words()]
    pieces += [(char, -8.0) for char in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with merges from the caption words, in the order of their length.

    Some words stay in several tokens, and the longest captions are longer than the model reads: as in FLUX itself, the
    pooled embedding is of a prompt's beginning, and T5 reads all of it.
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


class TextConditioner:
    """Tokenizers and encoders of one pipeline, used the way FluxPipeline uses them: padded, never masked."""

    def __init__(self) -> None:
        self.t5_tokenizer = build_t5_tokenizer()
        self.clip_tokenizer = build_clip_tokenizer()
        self.t5 = build_t5(len(self.t5_tokenizer))
        self.clip = build_clip(self.clip_tokenizer)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns prompt embeddings `(batch, tokens, 128)` and pooled embeddings `(batch, 128)`."""
        t5_ids = _token_ids(self.t5_tokenizer, prompts)
        clip_ids = _token_ids(self.clip_tokenizer, prompts)
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output


def _token_ids(tokenizer: T5Tokenizer | CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


class _CaptionReader(nn.Module):
    """Reads the attributes back from the two encoders' outputs; thrown away after training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(POSITIONS) + 1, dim) * 0.5)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.from_tokens = nn.ModuleDict({k: nn.Linear(dim, c) for k, (_, c) in _CLASSES.items()})
        self.from_pooled = nn.ModuleDict({k: nn.Linear(dim, p * c) for k, (p, c) in _CLASSES.items()})

    def forward(self, tokens: Tensor, pooled: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the loss and the share of attributes that the token route reads right."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read, _ = self.attention(queries, tokens, tokens, need_weights=False)
        loss, right, count = tokens.new_zeros(()), 0.0, 0.0
        for key, (places, classes) in _CLASSES.items():
            rows = read[:, :places] if places > 1 else read[:, -1:]
            logits = self.from_tokens[key](rows).float().flatten(0, 1)
            target = targets[key].flatten()
            pooled_logits = self.from_pooled[key](pooled).float().view(-1, classes)
            loss = loss + F.cross_entropy(logits, target) + F.cross_entropy(pooled_logits, target)
            known = target >= 0
            right += float((logits.argmax(-1) == target)[known].sum())
            count += float(known.sum())
        return loss, torch.tensor(right / count)


def train_text(run_dir: Path, *, num_steps: int = NUM_STEPS, batch_size: int = 128) -> TextConditioner:
    """Train, or resume, both encoders together on captions and what they say."""
    conditioner = TextConditioner()
    torch.manual_seed(3)
    reader = _CaptionReader(128)
    parts: dict[str, nn.Module] = {"t5": conditioner.t5, "clip": conditioner.clip, "reader": reader}
    parameters = [p for part in parts.values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)

    def loss_of(first: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        scenes = [sample_scene(i, held_out=held_out) for i in range(first, first + batch_size)]
        tokens, pooled = conditioner.encode([scene.caption for scene in scenes])
        result: tuple[Tensor, Tensor] = reader(tokens, pooled, attribute_targets(scenes))
        return result

    def train_step(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * warm_then_linear(step, num_steps, warm_up=50, hold=0.5, end=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = loss_of(step * batch_size)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {"loss": loss.item(), "read": float(accuracy)}

    @torch.no_grad()
    def look(step: int) -> None:
        print(f"  step {step}: {float(loss_of(10**8, held_out=True)[1]):.4f} of held-out attributes read", flush=True)

    state: dict[str, Stateful] = {**parts, "optimizer": optimizer}
    run_loop("text encoders", num_steps, train_step, state, run_dir / "text.pt", save_every=400, look=look)
    conditioner.t5.eval()
    conditioner.clip.eval()
    return conditioner
