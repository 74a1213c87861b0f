"""Classical models on a recipe's prepared data and splits, beside the figure of our run.

    perceiver prepare digits data/digits
    python benchmarks/baselines.py recipes/train/quickstart.yaml                  # the baselines
    python benchmarks/baselines.py runs/quickstart-001                            # and what this run has reached
    python benchmarks/baselines.py recipes/train/av_digits.yaml --only video      # of one of several inputs

They are the usual ones for a first look at an input, with one label per sample. Images and videos: logistic regression
and a support vector machine with a Gaussian kernel on the pixels. Sound: the same on mean, deviation, smallest and
largest value of each band of a log-mel spectrogram over time. Texts: linear models on TF-IDF of character 1- to
4-grams. Several inputs: all of these together, each divided by its own spread. What has more than 100 values is first
reduced to its principal components. `--cnn` adds a small convolutional network on pictures and spectrograms, which
takes minutes.

All see what the model sees: the recipe's view of the data, through our readers, without augmentation. The strength of
the regularisation and the epochs of the network are chosen on a fifth of the training split (stratified, seed 0). The
model with the best choice is then trained on all of the training split and tested once.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC

from cluster.recipe.config import load_recipe
from perceiver.config import UserError
from perceiver.modalities.mel import MelConfig, log_mel
from perceiver.text_ids import SPECIALS
from pipelines.feed.ingest import EvalShare, eval_batches, load_data

Arrays = dict[str, NDArray[Any]]
VALIDATION, SEED = 0.2, 0
COMPONENTS = 100
"""Principal components of what has more values."""
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Values of C, the inverse of the regularisation."""
EPOCHS, BATCH = 30, 64


def arrays(data: Any, manifest: Any, split: str) -> Arrays:
    """Return all samples of a split as the recipe shows them in evaluation, by batch key."""
    batches = list(eval_batches(data, manifest, EvalShare(split, 100), "cpu"))
    keys = [key for key in batches[0] if key not in ("sample_id", "valid")]
    return {key: torch.cat([each[key][each["valid"]] for each in batches]).numpy() for key in keys}


def texts(ids: NDArray[Any], mask: NDArray[Any]) -> list[str]:
    """Return the texts of byte ids (n, M); what is cut within a character loses it."""
    rows = zip(ids, mask, strict=True)
    return [bytes((row[there & (row >= SPECIALS)] - SPECIALS).tolist()).decode(errors="ignore") for row, there in rows]


def spectrograms(audio: NDArray[Any], rate: int) -> NDArray[Any]:
    """Return log-mel spectrograms (n, frames, 40) of sound (n, T)."""
    high = min(7600, rate / 2)
    shape = MelConfig(samples=audio.shape[1], rate=rate, window=1024, hop=512, bins=40, low=50, high=high)
    parts = torch.from_numpy(audio).split(256)
    return torch.cat([log_mel(part.float() / 32768, shape) for part in parts]).numpy()


def pictures(found: Arrays, rate: int) -> Arrays:
    """Return each input as a picture (n, channels, H, W): images, frames of videos as channels, spectrograms."""
    shown: Arrays = {}
    for key in ("image", "video"):
        if key in found:
            shown[key] = found[key].reshape(len(found[key]), -1, *found[key].shape[-2:]).astype(np.float32) / 255
    if "audio" in found:
        shown["audio"] = spectrograms(found["audio"], rate)[:, None]
    return shown


def features(found: Arrays, rate: int) -> Arrays:
    """Return a row of numbers per sample for each input."""
    rows = {key: each.reshape(len(each), -1) for key, each in pictures(found, rate).items()}
    if "audio" in rows:
        mel = spectrograms(found["audio"], rate)
        rows["audio"] = np.concatenate([mel.mean(1), mel.std(1), mel.min(1), mel.max(1)], axis=1)
    return rows


class Rows:
    """Turns samples into one row each.

    Args:
        found: the samples from which scales, components and counts are taken.
        rate: of sound, in samples per second.
    """

    def __init__(self, found: Arrays, rate: int) -> None:
        self.rate, self.text = rate, None
        self.parts: dict[str, Any] = {}
        self.spreads: dict[str, float] = {}
        if "text" in found:
            self.text = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
            self.text.fit(texts(found["text"], found["text_mask"]))
            return
        for key, rows in features(found, rate).items():
            # Each value of sound has a unit of its own, pixels have one.
            scaled = [StandardScaler()] if key == "audio" else []
            reduced = [PCA(COMPONENTS, random_state=SEED)] if rows.shape[1] > COMPONENTS else []
            self.parts[key] = make_pipeline(*scaled, *reduced, FunctionTransformer())
            self.spreads[key] = float(self.parts[key].fit_transform(rows).std())

    def __call__(self, found: Arrays) -> Any:
        """Return the rows of samples."""
        if self.text is not None:
            return self.text.transform(texts(found["text"], found["text_mask"]))
        rows = features(found, self.rate)
        return np.concatenate([self.parts[key].transform(rows[key]) / self.spreads[key] for key in rows], axis=1)


def machines(of_text: bool) -> dict[str, Callable[[float], Any]]:
    """Return the models by name, each a function of its C."""
    linear = {"logistic regression": lambda c: LogisticRegression(C=c, max_iter=2000)}
    if of_text:
        return linear | {"linear SVM": lambda c: LinearSVC(C=c, random_state=SEED)}
    return linear | {"SVM (Gaussian kernel)": lambda c: SVC(C=c)}


def divided(labels: NDArray[Any]) -> tuple[Any, Any]:
    """Return the rows to train on and those of the validation part."""
    rows = np.arange(len(labels))
    kept, held = train_test_split(rows, test_size=VALIDATION, stratify=labels, random_state=SEED)
    return kept, held


def part(found: Arrays, rows: NDArray[Any]) -> Arrays:
    """Return some samples."""
    return {key: each[rows] for key, each in found.items()}


def accuracy(model: Any, rows: Any, labels: NDArray[Any]) -> float:
    """Return the share of correct answers."""
    return float((model.predict(rows) == labels).mean())


def classical(train: Arrays, test: Arrays, rate: int) -> Iterator[tuple[str, float, float, float]]:
    """Yield (name, accuracy on the validation part, on the test split, seconds) of each model."""
    kept, held = divided(train["label"])
    rows = Rows(part(train, kept), rate)
    shown, checked = rows(part(train, kept)), rows(part(train, held))
    rows = Rows(train, rate)
    everything, tested = rows(train), rows(test)
    for name, build in machines("text" in train).items():
        began = time.perf_counter()
        scores = {
            c: accuracy(build(c).fit(shown, train["label"][kept]), checked, train["label"][held]) for c in STRENGTHS
        }
        best = max(scores, key=lambda c: scores[c])
        model = build(best).fit(everything, train["label"])
        yield f"{name}, C = {best:g}", scores[best], accuracy(model, tested, test["label"]), time.perf_counter() - began


class Network(torch.nn.Module):
    """Three convolutions for each input, pooled and joined."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], classes: int) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict({key: self._part(shape[0]) for key, shape in shapes.items()})
        self.head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(128 * 4 * len(shapes), classes))

    @staticmethod
    def _part(channels: int) -> torch.nn.Module:
        layers: list[torch.nn.Module] = [torch.nn.BatchNorm2d(channels)]
        for width in (32, 64, 128):
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
            layers += [torch.nn.MaxPool2d(2)] if width < 128 else [torch.nn.AdaptiveMaxPool2d(2), torch.nn.Flatten()]
            channels = width
        return torch.nn.Sequential(*layers)

    def forward(self, shown: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return logits."""
        return self.head(torch.cat([each(shown[key]) for key, each in self.parts.items()], dim=1))


def trained(train: Arrays, held: Arrays, epochs: int, rate: int) -> list[float]:
    """Return the accuracy on `held` after each epoch of a network."""
    torch.manual_seed(SEED)
    shown, checked = ({k: torch.from_numpy(v) for k, v in pictures(each, rate).items()} for each in (train, held))
    labels, wanted = torch.from_numpy(train["label"]), torch.from_numpy(held["label"])
    model = Network({key: tuple(each.shape[1:]) for key, each in shown.items()}, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    found = []
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(model({k: v[rows] for k, v in shown.items()}), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found.append(float((model(checked).argmax(1) == wanted).float().mean()))
    return found


def network(train: Arrays, test: Arrays, rate: int) -> tuple[str, float, float, float]:
    """Train a network with as many epochs as are best on the validation part; see `classical` for the result."""
    began = time.perf_counter()
    kept, held = divided(train["label"])
    scores = trained(part(train, kept), part(train, held), EPOCHS, rate)
    epochs = int(np.argmax(scores)) + 1
    reached = trained(train, test, epochs, rate)[-1]
    return f"small CNN, {epochs} epochs", max(scores), reached, time.perf_counter() - began


def results(train: Arrays, test: Arrays, rate: int, *, cnn: bool) -> Iterator[tuple[str, float, float, float]]:
    """Yield the results of all models, see `classical`."""
    yield from classical(train, test, rate)
    if cnn:
        yield network(train, test, rate)


def recorded(run: Path) -> float:
    """Return the accuracy of a run's last evaluation."""
    rows = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1]


def main() -> None:
    """Run the command line described at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a recipe, or the folder of a run")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as of perceiver train")
    parser.add_argument("--only", help="one of several inputs: image, video, audio or text")
    parser.add_argument("--cnn", action="store_true", help="also train a small convolutional network")
    given = parser.parse_args()
    path = given.source / "recipe.yaml" if given.source.is_dir() else given.source
    recipe = load_recipe(path, given.overrides)
    data = recipe.data.model_copy(update={"executor": "inline"})
    manifest = load_data(data)
    train, test = (arrays(data, manifest, split) for split in (data.train_split, data.eval_split))
    if train.get("label", np.zeros((0, 0))).ndim != 1:
        raise UserError(f"{data.url}: wanted data with one class per sample, a feature `label`")
    if given.only:
        others = {"image", "video", "audio", "text"} - {given.only}
        train, test = ({key: each for key, each in found.items() if key not in others} for found in (train, test))
    print(f"{manifest.name}: {len(train['label']):,} {data.train_split}, {len(test['label']):,} {data.eval_split}\n")
    print("| model | validation % | test % | seconds |\n|---|---:|---:|---:|", flush=True)
    if given.source.is_dir():
        print(f"| ours, {given.source} | | {100 * recorded(given.source):.1f} | |", flush=True)
    rate = data.audio.rate
    for name, checked, reached, seconds in results(train, test, rate, cnn=given.cnn and "text" not in train):
        print(f"| {name} | {100 * checked:.1f} | {100 * reached:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
