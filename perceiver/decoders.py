"""Decoders of Perceiver IO: output queries, and the mapping of their answers to outputs.

Sources: Perceiver IO §3.2, App. E (query construction), F (language), H (flow), I (Kinetics); for `general` the
interface of GPV-1 (Gupta et al., CVPR 2022, arXiv 2104.00743): boxes with their relevance and a text, all at once.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from perceiver.attention import haiku_default, linear, zero_linear
from perceiver.config import Bands, Config, Scale, Size, UserError
from perceiver.model import latent_array, need_classes
from perceiver.positions import Inputs, fourier_features


class _Sized(Protocol):
    elements: int
    channels: int


class ClassDecoderConfig(Config):
    """One learned query whose answer is a label (Perceiver IO App. A; the released ClassificationDecoder)."""

    kind: Literal["class"] = "class"
    channels: Size | None = Field(default=None, description="Width of the query; the latents' by default.")
    init_std: Scale = Field(default=0.02, description="Scale of the query's truncated normal.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Build the decoder; `classes` is required."""
        tasks = {"": need_classes(classes)}
        return MultitaskDecoder(self.channels or latent_channels, tasks, self.init_std)


class MultitaskDecoderConfig(Config):
    """One learned query for each classification task (Perceiver IO §4.1, multitask queries)."""

    kind: Literal["multitask"] = "multitask"
    tasks: dict[str, Size] = Field(min_length=1, description="Number of classes by task name.")
    channels: Size | None = Field(default=None, description="Width of the queries; the latents' by default.")
    init_std: Scale = Field(default=0.02, description="Scale of the queries' truncated normal.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Build the decoder."""
        # Sorted, because a recipe that was stored and read again may have its keys in another order.
        return MultitaskDecoder(self.channels or latent_channels, dict(sorted(self.tasks.items())), self.init_std)


class MultitaskDecoder(nn.Module):
    """A learned query and a linear layer for each task; with one unnamed task, a plain classifier."""

    def __init__(self, channels: int, tasks: Mapping[str, int], init_std: float) -> None:
        super().__init__()
        if not tasks:
            raise UserError("decoder.tasks: got none; wanted at least one task with its number of classes")
        self.tasks = tuple(tasks)
        self.channels = self.output_channels = channels
        self.query = latent_array(len(tasks), channels, init_std)
        self.heads = nn.ModuleList(zero_linear(channels, classes) for classes in tasks.values())

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the queries for each sample, (B, tasks, channels)."""
        return Inputs(self.query.expand(inputs.data.shape[0], -1, -1))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, tasks, channels) to logits (B, K) of the unnamed task, or to logits by task name."""
        logits = {name: head(answers[:, i]) for i, (name, head) in enumerate(zip(self.tasks, self.heads, strict=True))}
        return logits[""] if self.tasks == ("",) else logits


class TokenDecoderConfig(Config):
    """A query for each position; logits over the vocabulary by the inputs' embedding (Perceiver IO App. F)."""

    kind: Literal["tokens"] = "tokens"
    queries: Literal["learned", "inputs"] = Field(
        default="learned", description="Learned vectors, or the encoder's inputs, as for flow (App. H)."
    )
    init_std: Scale = Field(default=0.02, description="Scale of the learned queries' truncated normal.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Make the decoder for text inputs."""
        tokens = getattr(inputs, "tokens", None)
        if not isinstance(tokens, nn.Embedding):
            raise UserError("decoder.kind: got 'tokens' for inputs without tokens; wanted model.inputs.kind text")
        length = cast(_Sized, inputs).elements if self.queries == "learned" else 0
        return TokenDecoder(tokens, length, self.init_std)


class TokenDecoder(nn.Module):
    """Queries (M, channels), learned or the inputs -> logits (B, M, vocabulary), tied to the embedding."""

    def __init__(self, tokens: nn.Embedding, length: int, init_std: float) -> None:
        super().__init__()
        self.channels = self.output_channels = tokens.embedding_dim
        self.query = latent_array(length, self.channels, init_std) if length else None
        self.bias = nn.Parameter(torch.zeros(tokens.num_embeddings))
        self._tied = (tokens,)  # in a tuple, so that the inputs' module is not registered twice

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return a query for each input position, (B, M, channels)."""
        if self.query is None:
            return Inputs(inputs.data)
        return Inputs(self.query[: inputs.elements].expand(inputs.data.shape[0], -1, -1))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, M, channels) to logits (B, M, vocabulary)."""
        return answers @ self._tied[0].weight.t() + self.bias


class FlowDecoderConfig(Config):
    """The encoder's inputs as queries; two numbers for each pixel (Perceiver IO App. H)."""

    kind: Literal["flow"] = "flow"
    scale: Scale = Field(default=0.01, description="Factor from the linear layer's output to pixels.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Make the decoder for inputs on an image grid."""
        return FlowDecoder(cast(_Sized, inputs).channels, tuple(cast(Any, inputs).grid), self.scale)


class FlowDecoder(nn.Module):
    """Inputs (B, H*W, C) as queries -> flow (B, 2, H, W) in pixels, horizontal first; zero at the start.

    Asked for `flow` at the pixels (B, q), numbered row by row: (B, 2, q).
    """

    def __init__(self, channels: int, grid: tuple[int, int], scale: float) -> None:
        super().__init__()
        self.channels = self.output_channels = channels
        self.grid, self.scale = grid, scale
        self.head = zero_linear(channels, 2)

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the inputs themselves, or those of the pixels asked for; of frames apart those of the first."""
        if not asked:
            pixels = math.prod(self.grid)
            return inputs if inputs.elements == pixels else Inputs(inputs.dense[:, :pixels])
        index = asked["flow"][..., None].expand(-1, -1, self.channels)
        return Inputs(inputs.dense.expand(len(index), -1, -1).gather(1, index))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, H*W, C) to flow (B, 2, H, W), or (B, q, C) to (B, 2, q)."""
        flow = (self.head(answers) * self.scale).transpose(1, 2)
        return flow if asked else flow.unflatten(2, self.grid)


class PixelDecoderConfig(Config):
    """The encoder's inputs as queries, as for flow; the logits of a class for each (Perceiver IO App. H)."""

    kind: Literal["pixels"] = "pixels"

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Make the decoder for inputs on an image grid; `classes` is required."""
        grid = getattr(inputs, "grid", ())
        if len(grid) != 2:
            raise UserError(
                f"decoder.kind: got 'pixels' for inputs of grid {tuple(grid)}; wanted model.inputs.kind image"
            )
        if getattr(cast(Any, inputs).config, "permute", None) is not None:
            raise UserError("decoder.kind: got 'pixels' for permuted inputs; wanted inputs.permute null")
        return PixelDecoder(cast(_Sized, inputs).channels, (int(grid[0]), int(grid[1])), need_classes(classes))


class PixelDecoder(nn.Module):
    """Inputs (B, h*w, C) as queries -> logits (B, K, h, w) on the inputs' grid; zero at the start.

    Asked for `pixels` (B, q), numbered row by row: (B, K, q).
    """

    def __init__(self, channels: int, grid: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.channels = self.output_channels = channels
        self.grid = grid
        self.head = zero_linear(channels, classes)

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the inputs themselves, or those of the pixels asked for."""
        if not asked:
            return inputs
        index = asked["pixels"][..., None].expand(-1, -1, self.channels)
        return Inputs(inputs.dense.expand(len(index), -1, -1).gather(1, index))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, h*w, C) to logits (B, K, h, w), or (B, q, C) to (B, K, q)."""
        logits = self.head(answers).transpose(1, 2)
        return logits if asked else logits.unflatten(2, self.grid)


class GridOutput(Config):
    """An output at the points of a grid, queried by Fourier positions."""

    grid: tuple[Size, ...] = Field(description="Shape of the grid of output elements.")
    values: Size = Field(description="Values per element.")
    bands: Bands = Field(description="Frequencies per axis.")
    max_resolution: tuple[Scale, ...] = Field(description="Sampling rate per axis.")


class LabelOutput(Config):
    """One class label, queried by a learned vector."""

    classes: Size = Field(description="Number of classes.")
    channels: Size = Field(default=1024, description="Width of the query.")


class MultimodalDecoderConfig(Config):
    """Outputs of several modalities from one cross-attention; grids may be asked at some points only (App. I)."""

    kind: Literal["multimodal"] = "multimodal"
    modalities: dict[str, GridOutput | LabelOutput] = Field(description="Outputs by name.")
    min_padding: Size = Field(default=2, description="Least width of the learned modality vectors.")
    answer_channels: Size = Field(default=512, description="Width between the decoder and the outputs.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Build the decoder."""
        return MultimodalDecoder(self)


class MultimodalDecoder(nn.Module):
    """Queries of all modalities, padded with learned vectors to one width, in alphabetical order.

    `asked[name]`, (B, q) or (q,) int64, are row-major indices of a grid's elements; all elements if it is missing.
    """

    def __init__(self, config: MultimodalDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.specs = {name: config.modalities[name] for name in sorted(config.modalities)}
        widths = {
            n: s.channels if isinstance(s, LabelOutput) else len(s.grid) * (2 * s.bands + 1)
            for n, s in self.specs.items()
        }
        self.channels = self.output_channels = max(widths.values()) + config.min_padding
        self.padding = nn.ParameterDict({n: latent_array(1, self.channels - w, 0.02) for n, w in widths.items()})
        self.labels = nn.ParameterDict(
            {n: latent_array(1, s.channels, 0.02) for n, s in self.specs.items() if isinstance(s, LabelOutput)}
        )
        self.project = haiku_default(linear(self.channels, config.answer_channels))
        self.heads = nn.ModuleDict(
            {
                n: haiku_default(linear(config.answer_channels, s.classes if isinstance(s, LabelOutput) else s.values))
                for n, s in self.specs.items()
            }
        )

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the queries of all modalities, (B, O, channels)."""
        batch, device = inputs.data.shape[0], inputs.data.device
        dtype = torch.promote_types(inputs.data.dtype, torch.float32)
        parts = []
        for name, spec in self.specs.items():
            if isinstance(spec, LabelOutput):
                query = self.labels[name].to(dtype)[None]
            else:
                query = grid_queries(spec, None if asked is None else asked.get(name), dtype, device)
            query = query.expand(batch, -1, -1)
            padding = self.padding[name].to(dtype).expand(*query.shape[:2], -1)
            parts.append(torch.cat([query, padding], dim=-1))
        return Inputs(torch.cat(parts, dim=1))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, O, channels) to {name: (B, q, values) or (B, classes)}."""
        sizes = []
        for name, spec in self.specs.items():
            points = None if asked is None or isinstance(spec, LabelOutput) else asked.get(name)
            whole = 1 if isinstance(spec, LabelOutput) else math.prod(spec.grid)
            sizes.append(whole if points is None else points.shape[-1])
        result = {}
        for (name, spec), part in zip(self.specs.items(), self.project(answers).split(sizes, dim=1), strict=True):
            values = self.heads[name](part)
            result[name] = values[:, 0] if isinstance(spec, LabelOutput) else values
        return result


class GeneralDecoderConfig(Config):
    """Learned queries for boxes, as in DETR, and for the bytes of a text, tied to the inputs' embedding."""

    kind: Literal["general"] = "general"
    boxes: Size = Field(default=16, description="Box queries: the most boxes that are found in an image.")
    length: Size = Field(default=32, description="Text queries: the most bytes of an answer, its end included.")
    init_std: Scale = Field(default=0.02, description="Scale of the queries' truncated normal.")

    def build(self, *, latent_channels: int, inputs: nn.Module, classes: int | None) -> nn.Module:
        """Build the decoder for inputs of which one is text."""
        found = list(_tables(inputs))
        if len(found) != 1:
            raise UserError(
                f"decoder.kind: got 'general' for inputs with {len(found)} texts; wanted model.inputs.kind multimodal "
                "with an image and one text"
            )
        return GeneralDecoder(self, found[0])


def _tables(inputs: nn.Module) -> Iterator[nn.Embedding]:
    """Yield the embeddings of the inputs that are text."""
    for module in (inputs, *getattr(inputs, "modalities", nn.ModuleDict()).values()):
        if isinstance(tokens := getattr(module, "tokens", None), nn.Embedding):
            yield tokens


class BoxHead(nn.Module):
    """States (B, R, C) -> boxes (B, R, 4): three linear layers and a sigmoid, as in DETR.

    A box is cx, cy, w, h in shares of the image's width and height.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([linear(channels, channels), linear(channels, channels), linear(channels, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the boxes."""
        for layer in list(self.layers)[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x).sigmoid()


class GeneralDecoder(nn.Module):
    """Learned queries -> `boxes` (B, R, 4), `relevance` (B, R, 2) and `text` (B, T, vocabulary).

    Relevance are logits, of a relevant box first. The text's logits are the answers' products with the embedding of the
    inputs, divided by the root of its width, since its values start with a deviation of 1.
    """

    def __init__(self, config: GeneralDecoderConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        self.channels = self.output_channels = tokens.embedding_dim
        self.query = latent_array(config.boxes + config.length, self.channels, config.init_std)
        self.box = BoxHead(self.channels)
        self.relevance = linear(self.channels, 2)
        self.bias = nn.Parameter(torch.zeros(tokens.num_embeddings))
        self._tied = (tokens,)  # in a tuple, so that the inputs' module is not registered twice

    def queries(self, inputs: Inputs, asked: Mapping[str, Tensor] | None) -> Inputs:
        """Return the queries for each sample, (B, R + T, channels): those of the boxes first."""
        return Inputs(self.query.expand(inputs.data.shape[0], -1, -1))

    def outputs(self, answers: Tensor, asked: Mapping[str, Tensor] | None) -> Any:
        """Map answers (B, R + T, channels) to boxes, relevance and text."""
        regions, words = answers.split([self.config.boxes, self.config.length], dim=1)
        text = words @ self._tied[0].weight.t() * self.channels**-0.5 + self.bias
        return {"boxes": self.box(regions), "relevance": self.relevance(regions), "text": text}


def grid_queries(spec: GridOutput, points: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Fourier positions of a grid's elements: (B or 1, q, P).

    Coordinates are -1 + 2 i / n, as the released code has them for subsampled queries, so that training on some points
    and decoding all of them agree.
    """
    if points is None:
        points = torch.arange(math.prod(spec.grid), device=device)
    points = points[None] if points.dim() == 1 else points
    coordinates = torch.stack(
        [-1 + 2 * i.to(dtype) / n for i, n in zip(torch.unravel_index(points, spec.grid), spec.grid, strict=True)], -1
    )
    return fourier_features(coordinates, spec.bands, spec.max_resolution)


DecoderConfig = Annotated[
    ClassDecoderConfig
    | MultitaskDecoderConfig
    | TokenDecoderConfig
    | FlowDecoderConfig
    | PixelDecoderConfig
    | MultimodalDecoderConfig
    | GeneralDecoderConfig,
    Field(discriminator="kind"),
]
