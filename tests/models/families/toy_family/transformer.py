"""The model, as if it came from elsewhere: it knows nothing of elastic blocks."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

NUM_LETTERS = 128


class ToyBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)
        self.mlp_in = nn.Linear(channels, 4 * channels)
        self.mlp_out = nn.Linear(4 * channels, channels)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        joint = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        joint = joint + self.mix(joint.mean(1, keepdim=True)) + temb[:, None]
        joint = joint + self.mlp_out(F.gelu(self.mlp_in(joint)))
        text, image = joint.split((encoder_hidden_states.shape[1], hidden_states.shape[1]), dim=1)
        return text, image


class ToyTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types here
    @register_to_config  # type: ignore[untyped-decorator]  # as above
    def __init__(self, channels: int = 16, num_layers: int = 3) -> None:
        super().__init__()
        self.image_in = nn.Linear(3, channels)
        self.text_in = nn.Embedding(NUM_LETTERS, channels)
        self.time_in = nn.Linear(1, channels)
        self.blocks = nn.ModuleList(ToyBlock(channels) for _ in range(num_layers))
        self.image_out = nn.Linear(channels, 3)

    def forward(self, latents: Tensor, timestep: Tensor, letters: Tensor) -> Tensor:
        """The velocity `(batch, tokens, 3)`."""
        hidden_states, encoder_hidden_states = self.image_in(latents), self.text_in(letters)
        temb = self.time_in(timestep[:, None])
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        velocity: Tensor = self.image_out(hidden_states)
        return velocity
