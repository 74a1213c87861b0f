"""What GPV-1 sees: a DETR detector, small or that of the transformers library, and the features of its regions."""

import itertools
import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver.baselines._gpv_layers import DecoderLayer, EncoderLayer
from perceiver.baselines._grid import transformers_library
from perceiver.config import Config, Layers, Real, Size
from perceiver.decoders import BoxHead
from perceiver.model import latent_array


class Seen(NamedTuple):
    """What a detector sees: features (B, F, h, w) of the image, and states (B, R, C) of its queries."""

    features: Tensor
    states: Tensor


class ConvDetectorConfig(Config):
    """A small DETR after 3x3 convolutions of stride 2, trained with the rest."""

    kind: Literal["conv"] = "conv"
    widths: tuple[Size, ...] = Field(default=(16, 32, 64), description="Channels of the convolutions.")
    queries: Size = Field(default=16, description="Learned queries, each a box.")
    channels: Size = Field(default=64, description="Width of the Transformer.")
    layers: Layers = Field(default=2, description="Layers of the encoder, and of the decoder.")
    heads: Size = Field(default=4, description="Heads of each.")
    hidden: Size = Field(default=192, description="Inner width of the feed-forward parts.")
    dropout: Real = Field(default=0.0, ge=0, lt=1, description="In the Transformer.")

    def build(self, image_channels: int) -> "Detector":
        """Build the detector."""
        return ConvDetector(self, image_channels)


class DetrDetectorConfig(Config):
    """DETR of the transformers library with a ResNet-50, whose weights are the user's (`train.init_from`)."""

    kind: Literal["detr"] = "detr"
    queries: Size = Field(default=100, description="Learned queries, each a box.")
    channels: Size = Field(default=256, description="Width of the Transformer.")
    layers: Layers = Field(default=6, description="Layers of the encoder, and of the decoder.")
    heads: Size = Field(default=8, description="Heads of each.")
    hidden: Size = Field(default=2048, description="Inner width of the feed-forward parts.")
    dropout: Real = Field(default=0.1, ge=0, lt=1, description="In the Transformer.")
    depths: tuple[Layers, ...] = Field(default=(3, 4, 6, 3), description="Blocks of the ResNet's stages.")
    widths: tuple[Size, ...] = Field(default=(256, 512, 1024, 2048), description="Channels of the ResNet's stages.")
    stem: Size = Field(default=64, description="Channels of the ResNet's first convolution.")

    def build(self, image_channels: int) -> "Detector":
        """Build the detector."""
        return DetrDetector(self, image_channels)


class Detector(nn.Module):
    """Base of the detectors: boxes and objectness of the queries' states.

    Attributes: `width` of the features, `channels` of the states.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.width, self.channels = width, channels
        self.bbox_predictor = BoxHead(channels)
        self.objectness = nn.Linear(channels, 2)

    def see(self, image: Tensor) -> Seen:
        """Return the features of normalised images (B, C, H, W) and the states of the queries."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `see` does, as the module's own pass, at which ZeRO stage 3 gathers its parameters."""
        features, states = self.see(image)
        return features, states


class ConvDetector(Detector):
    """See `ConvDetectorConfig`."""

    def __init__(self, config: ConvDetectorConfig, image_channels: int) -> None:
        super().__init__(config.widths[-1], config.channels)
        sizes = [image_channels, *config.widths]
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in config.widths)
        self.input_projection = nn.Conv2d(config.widths[-1], config.channels, 1)
        self.query = latent_array(config.queries, config.channels, 1.0)
        shape = config.channels, config.heads, config.hidden, config.dropout
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(config.layers))
        self.decoder = nn.ModuleList(DecoderLayer(*shape) for _ in range(config.layers))

    def see(self, image: Tensor) -> Seen:
        """See the base class."""
        features = image
        for convolution, norm in zip(self.stem, self.norms, strict=True):
            features = norm(convolution(features)).relu()
        x = self.input_projection(features)
        places = sine_positions(x.shape[2], x.shape[3], self.channels, x)
        memory = x.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            memory = layer(memory, positions=places)
        # The states start at zero and the queries are their positions, as in DETR.
        states = torch.zeros_like(self.query).expand(image.shape[0], -1, -1)
        for layer in self.decoder:
            states = layer(states, memory, positions=self.query, memory_positions=places)
        return Seen(features, states)


class DetrDetector(Detector):
    """See `DetrDetectorConfig`; the module `model` has the names of `transformers.DetrModel`."""

    def __init__(self, config: DetrDetectorConfig, image_channels: int) -> None:
        super().__init__(config.widths[-1], config.channels)
        self.dropout = config.dropout
        library = transformers_library()
        backbone = library.ResNetConfig(
            num_channels=image_channels,
            depths=list(config.depths),
            hidden_sizes=list(config.widths),
            embedding_size=config.stem,
            out_features=[f"stage{len(config.depths)}"],
        )
        values = library.DetrConfig(
            backbone_config=backbone,
            num_channels=image_channels,
            num_queries=config.queries,
            d_model=config.channels,
            encoder_layers=config.layers,
            decoder_layers=config.layers,
            encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads,
            encoder_ffn_dim=config.hidden,
            decoder_ffn_dim=config.hidden,
            dropout=config.dropout,
        )
        self.model = library.DetrModel(values)

    def see(self, image: Tensor) -> Seen:
        """See the base class."""
        # Not by the library's own forward pass, which keeps no features, and whose encoder reads values of the states
        # in training, which the meta device has not and for which a GPU would wait.
        model = self.model
        features, _ = model.backbone(image, torch.ones_like(image[:, 0]))[-1]
        x = model.input_projection(features).flatten(2).transpose(1, 2)
        shape: dict[str, Any] = {"shape": features.shape, "device": image.device, "dtype": image.dtype}
        places = model.position_embedding(**shape).flatten(2).transpose(1, 2)
        memory = F.dropout(x, self.dropout, self.training)
        for layer in model.encoder.layers:
            found, _ = layer.self_attn(hidden_states=memory, attention_mask=None, position_embeddings=places)
            memory = layer.self_attn_layer_norm(memory + F.dropout(found, self.dropout, self.training))
            memory = layer.final_layer_norm(memory + layer.mlp(memory))
        queries = model.query_position_embeddings.weight.expand(image.shape[0], -1, -1)
        states = model.decoder(
            inputs_embeds=torch.zeros_like(queries),
            object_queries_position_embeddings=queries,
            spatial_position_embeddings=places,
            encoder_hidden_states=memory,
            encoder_attention_mask=None,
        )
        return Seen(features, states.last_hidden_state)


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Return DETR's sine positions (H*W, channels): of the row in the first half, of the column in the second."""
    quarter = -(-channels // 4)
    rates = 10_000 ** (-torch.arange(quarter, device=like.device, dtype=like.dtype) / quarter)
    axes = []
    for size in (height, width):
        places = (torch.arange(size, device=like.device, dtype=like.dtype) + 1) / size * 2 * math.pi
        angles = places[:, None] * rates
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    rows = axes[0][:, None].expand(-1, width, -1)
    columns = axes[1][None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :channels]


def region_features(features: Tensor, boxes: Tensor, points: int) -> Tensor:
    """Return the mean (B, R, F) of features (B, F, h, w), read bilinearly at points x points places of each box.

    The places are the centres of equal parts of the box, as in RoIAlign with one sample per bin; outside of the image
    the features are those of its border. The result is normalised over F, without weights. Boxes have no gradient by
    it: published detectors detach them.
    """
    centre, size = boxes[..., :2].detach(), boxes[..., 2:].detach()
    steps = (torch.arange(points, device=boxes.device, dtype=boxes.dtype) + 0.5) / points - 0.5
    offsets = torch.stack([steps.repeat(points), steps.repeat_interleave(points)], dim=-1)
    places = (centre[:, :, None] + offsets * size[:, :, None]) * 2 - 1
    found = F.grid_sample(features, places.to(features.dtype), padding_mode="border", align_corners=False)
    mean = found.mean(-1).transpose(1, 2)
    return F.layer_norm(mean, mean.shape[-1:])


DetectorConfig: Any = ConvDetectorConfig | DetrDetectorConfig
