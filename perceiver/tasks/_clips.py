"""Evaluation on several clips of a recording, their scores averaged (Perceiver §4.2: 16 overlapping clips)."""

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from perceiver.tasks._base import Batch, model_inputs, network

Average = Callable[[Tensor], Tensor]
"""Maps logits (B, K, C) of K clips to logits (B, C) of their mean score."""


def clip_logits(model: nn.Module, batch: Batch, average: Average) -> Tensor:
    """Return the model's logits (B, C) in float32; of samples that come as K clips, those of the mean score.

    Clips show in the batch as a second axis that the model's own inputs do not have: audio (B, K, T), video
    (B, K, F, C, H, W). They run through the model as B * K samples; inputs without that axis are repeated.
    """
    raw = model_inputs(model, batch)
    tensors = raw if isinstance(raw, dict) else {network(model).input_keys[0]: raw}
    clips = {} if model.training else _clips(model, tensors)
    if not clips:
        return model(raw).float()
    many = next(iter(clips.values()))
    folded = {
        key: value.flatten(0, 1) if key in clips else value.repeat_interleave(many, 0) for key, value in tensors.items()
    }
    logits = model(folded if isinstance(raw, dict) else next(iter(folded.values()))).float()
    return average(logits.unflatten(0, (-1, many)))


def _clips(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of clips of each input that has a clip axis."""
    net = network(model)
    if not hasattr(net, "example"):
        return {}
    ranks = {key: value.ndim for key, value in net.example(1, "meta").items()}
    return {key: value.shape[1] for key, value in tensors.items() if value.ndim == ranks.get(key, 0) + 1}


def mean_softmax(logits: Tensor) -> Tensor:
    """Map logits (B, K, C) to the log of the clips' mean class probabilities (B, C), which are logits again."""
    return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])


def mean_sigmoid(logits: Tensor) -> Tensor:
    """Map logits (B, K, C) to the logits (B, C) of the clips' mean sigmoid."""
    # log(mean p) - log(mean (1 - p)); the number of clips cancels.
    on = nn.functional.logsigmoid(logits).logsumexp(1)
    return on - nn.functional.logsigmoid(-logits).logsumexp(1)


def mean_output(outputs: Tensor) -> Tensor:
    """Map outputs (B, K, C) of K clips to their mean (B, C)."""
    return outputs.mean(1)
