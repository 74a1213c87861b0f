"""Cards of what a run's final model makes of evaluation samples: flow, filled-in words, reconstructions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cluster.recipe.config import Recipe, kind_of
from cluster.record.run_folder import RunFolder
from cluster.run.samples import built_model, load_final, one_batch, read_samples, spread
from perceiver.modalities.text import BYTE_VOCABULARY
from perceiver.model import Encoder
from perceiver.report.figures import image_uri, montage, picture
from perceiver.report.page import Card, CardPart, Words
from perceiver.tasks import Task, build_task
from perceiver.tasks.autoencoding import Autoencoding
from perceiver.tasks.masked_language import MaskedLanguage
from perceiver.text_ids import plain_text
from pipelines.inspect.samples import flow_colours, heard, strip
from pipelines.shards.manifest import Manifest

SHOWN = 12
"""Samples of these tasks that are shown, spread over the split."""
FRAMES, HEIGHT, GREY = 8, 64, (128, 128, 128)
"""Most frames of a video that are drawn, their height in pixels, and the colour between them."""
NOTES = {
    "flow": "the two frames, the true flow and the predicted one in the same colours. The hue is the direction, the "
    "saturation the length; grey is unknown.",
    "masked_language": "some words were masked. Green words are those that stood there, red ones are others; point at "
    "one to see what stood there.",
    "autoencoding": "above the original, below what the decoder makes of the latents.",
}

Draw = Callable[[Any, torch.nn.Module, dict[str, torch.Tensor], Recipe], Card]
"""Draws a batch of one sample; the card has no key yet."""


def drawn_cards(recipe: Recipe, folder: RunFolder, manifest: Manifest) -> tuple[list[Card], str]:
    """Return cards of some evaluation samples and what they show; none of a task that is not drawn here."""
    kind = kind_of(recipe.task)
    draw = _DRAWN.get(kind)
    if draw is None:
        return [], ""
    model, task = cast(Encoder, built_model(recipe, manifest)), build_task(recipe.task, classes=len(manifest.classes))
    if kind == "masked_language" and not _reads_bytes(model, task):
        return [], ""
    load_final(model, folder)
    chosen = spread(manifest.split(recipe.data.eval_split).samples, SHOWN)
    cards = []
    for number, sample in read_samples(recipe, manifest, chosen, chosen).items():
        batch = {name: torch.as_tensor(np.asarray(value))[None] for name, value in sample.view.items()}
        batch |= one_batch(model, sample.view)
        with torch.no_grad():
            card = draw(task, model, {**batch, "sample_id": torch.tensor([number])}, recipe)
        cards.append(replace(card, key=sample.key))
    return cards, NOTES[kind]


def _reads_bytes(model: torch.nn.Module, task: Task) -> bool:
    words = cast(MaskedLanguage, task).config.word_start
    return not words and cast(Any, model).inputs.tokens.num_embeddings == BYTE_VOCABULARY


def _flow(task: Task, model: torch.nn.Module, batch: dict[str, torch.Tensor], recipe: Recipe) -> Card:
    """Draw both frames, the true flow and the predicted one."""
    found = task.predict(model, batch)["prediction"][0].numpy()
    true = batch["flow"][0].numpy()
    valid: NDArray[np.bool_] = (
        batch["flow_valid"][0].numpy() if "flow_valid" in batch else np.ones(true.shape[1:], bool)
    )
    frames = [picture(frame.transpose(1, 2, 0)).convert("RGB") for frame in batch["video"][0].numpy()]
    longest = float(np.hypot(*true)[valid].max(initial=0))
    flows = [flow_colours(true, valid, longest), flow_colours(found, longest=longest)]
    note = ""
    if valid.any():
        error = float(np.hypot(*(found - true))[valid].mean())
        still = float(np.hypot(*true)[valid].mean())
        note = f"end-point error {error:.3g} pixels; of no motion {still:.3g}"
    return Card(parts=[strip([*frames, *flows], note or "no known flow")], note=note)


def _filled(task: Task, model: torch.nn.Module, batch: dict[str, torch.Tensor], recipe: Recipe) -> Card:
    """Return the text with what the model fills in for the masked words."""
    own = cast(MaskedLanguage, task)
    masked = own.masked(batch)
    hidden = batch["text"].masked_fill(masked, own.config.mask_id)
    guesses = task.predict(model, {**batch, "text": hidden})["prediction"][0].tolist()
    true, places = batch["text"][0].tolist(), masked[0].tolist()
    parts = [
        Words(plain_text(guesses[start:end]), "right" if guesses[start:end] == true[start:end] else "wrong", truth)
        if places[start]
        else Words(truth)
        for start, end in _runs(places)
        if (truth := plain_text(true[start:end]))
    ]
    filled = [part for part in parts if part.state != "given"]
    right = sum(part.state == "right" for part in filled)
    return Card(text=parts, note=f"{right} of {len(filled)} masked words are right")


def _runs(places: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of what is alike; masked words are apart, since spaces are not masked."""
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[start]:
            yield start, end
            start = end


def _reconstructed(task: Task, model: torch.nn.Module, batch: dict[str, torch.Tensor], recipe: Recipe) -> Card:
    """Draw frames and spectrogram above their reconstructions, with players of the sound."""
    found, own = task.predict(model, batch), cast(Autoencoding, task)
    parts: list[CardPart] = []
    notes = []
    for name in own.grids:
        true = own.targets(batch, name)[0].numpy()
        made = found[name][0].numpy()
        notes.append(f"{name} {own.psnr(name, float(np.square(true - made).mean())):.1f} dB")
        if name == "video":
            shape = batch["video"].shape[1:]
            unit = own.config.video_range == "unit"
            rows = [_frames(values if unit else values / 2 + 0.5, shape) for values in (true, made)]
            parts.append(CardPart("strip", image_uri(montage(rows, HEIGHT, GREY, gap=4), 960), "original, made"))
        else:
            rate = recipe.data.audio.rate
            for values, what in ((true, "original"), (made, "reconstruction")):
                samples = np.rint(values.ravel().clip(-1, 1) * 32767).astype(np.int16)
                parts += heard(samples, rate, what)
    if "prediction" in found and "label" in batch:
        right = int(found["prediction"][0]) == int(batch["label"][0])
        notes.append(f"class {'right' if right else 'wrong'}")
    return Card(parts=parts, note=", ".join(notes))


def _frames(values: NDArray[np.floating], shape: torch.Size) -> list[Image.Image]:
    """Return at most `FRAMES` pictures of values in [0, 1], (F * H * W, C), of a video (F, C, H, W)."""
    count, channels, height, width = shape
    pixels = (values.reshape(count, height, width, channels).clip(0, 1) * 255).round().astype(np.uint8)
    return [picture(pixels[number]).convert("RGB") for number in spread(count, FRAMES)]


_DRAWN: Mapping[str, Draw] = {"flow": _flow, "masked_language": _filled, "autoencoding": _reconstructed}
