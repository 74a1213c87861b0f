"""The contract of each kind of plug-in as a function, for the tests of a package that offers some (docs/plugins.md).

Each function raises an `AssertionError` that states what is wrong. They need the package to be installed, since they
look its things up by name as a recipe does.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from perceiver import registry
from perceiver.config import Config
from perceiver.factory import build_model, input_keys, model_config
from perceiver.tasks import Batch, build_task, model_inputs

SMALL_MODEL: Mapping[str, Any] = {"latents": 5, "latent_channels": 8, "self_attends_per_block": 1, "heads": 2}
"""Keys of a small Perceiver or Perceiver IO, apart from `kind` and `inputs`."""
CLASSES = 3


def check_modality(config: Config) -> None:
    """Check a modality: its announced sizes are the real ones, and a classifier learns through it."""
    _check_registered("perceiver.modalities", config)
    torch.manual_seed(0)
    model: Any = build_model(model_config({"kind": "perceiver", "inputs": config, **SMALL_MODEL}), classes=CLASSES)
    batch = _example(model, 2)
    _, inputs = model.read(batch)
    announced = (2, model.inputs.elements, model.inputs.channels)
    _expect(tuple(inputs.dense.shape) == announced, f"inputs are {tuple(inputs.dense.shape)}, announced {announced}")
    nn.init.normal_(model.head.weight)  # zero at first, which hides the gradients before it
    model(model_inputs(model, batch)).sum().backward()
    _check_gradients(model)


def check_model(config: Config) -> None:
    """Check a model: it announces its inputs, gives the logits of each class, and all its parameters learn."""
    _check_registered("perceiver.baselines", config)
    torch.manual_seed(0)
    model: Any = build_model(config, classes=CLASSES)
    batch = _example(model, 4)
    _expect(input_keys(model) == tuple(batch), f"input_keys are {input_keys(model)}, example has {tuple(batch)}")
    logits = model(model_inputs(model, batch))
    _expect(tuple(logits.shape) == (4, CLASSES), f"logits are {tuple(logits.shape)}, wanted (4, {CLASSES})")
    logits.square().sum().backward()
    _check_gradients(model)


def check_task(
    config: Config, model: Mapping[str, Any], batch: Batch, *, classes: int = CLASSES, draws: bool = False
) -> None:
    """Check a task: padding does not count, sums add up, the loss trains, metrics are finite.

    Args:
        config: the task's.
        model: the section `model:` of a recipe that it trains.
        batch: at least 3 samples with the model's inputs and the task's targets.
        classes: number of classes of the data.
        draws: whether the task draws random numbers per batch, so that sums over parts differ.
    """
    _check_registered("perceiver.tasks", config)
    torch.manual_seed(0)
    task, net = build_task(config, classes=classes), build_model(model_config(dict(model)), classes=classes).eval()
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    count = len(next(iter(batch.values())))
    rows = torch.arange(count)
    batch = {"sample_id": rows, **batch, "valid": rows < count - 1}
    whole = task.loss(net, batch)
    if not draws:
        real = task.loss(net, _rows(batch, slice(0, count - 1)))
        _check_equal(whole.sums, real.sums, "a padding row changes")
        parts = [task.loss(net, _rows(batch, part)).sums for part in (slice(0, 1), slice(1, count))]
        _check_equal({key: parts[0][key] + parts[1][key] for key in parts[0]}, whole.sums, "two micro-batches change")
    none = {**batch, "valid": torch.zeros(count, dtype=torch.bool)}
    _expect(float(task.count(none)) == 0, "padding rows are counted")
    _expect(float(task.loss(net, none).sums["loss"]) == 0, "padding rows have a loss")
    trained = task.loss(net.train(), batch)
    _expect(trained.loss_sum.dim() == 0 and trained.loss_sum.requires_grad, "loss_sum is not 0-d with a gradient")
    _expect(not any(value.requires_grad for value in trained.sums.values()), "sums have a gradient")
    trained.loss_sum.backward()
    _check_gradients(net)
    sums = {key: value if value.dim() else float(value) for key, value in whole.sums.items()}
    metrics = task.summarise(sums, float(task.count(batch)))
    _expect("loss" in metrics, f"summarise returns {sorted(metrics)}, wanted loss among them")
    _expect(all(map(math.isfinite, metrics.values())), f"metrics are not finite: {metrics}")
    sizes = {key: len(value) for key, value in task.predict(net.eval(), batch).items()}
    _expect(set(sizes.values()) == {count}, f"predict returns {sizes} rows, wanted {count} of each")


def check_source(name: str, src: str | None = None, **options: str) -> Any:
    """Check a source: it lists and reads the same twice, and can be prepared; return the manifest.

    Args:
        name: of the source.
        src: small raw data; None if the source needs none.
        options: of the source.
    """
    from pipelines.prepare import PrepareConfig, prepare
    from pipelines.sources import Rejected, load_source

    source = load_source(name)
    listings = [source.listing(src, seed=0, shard_rows=8, options=options) for _ in range(2)]
    units, again = (list(listing.units) for listing in listings)
    _expect(units == again, "two listings differ: they must be the same at each call")
    _expect(bool(units), "no unit is listed")
    json.dumps([unit.content for unit in units])  # raises a TypeError
    keys: list[str] = []
    for unit in units:
        samples, second = list(source.samples(unit)), list(source.samples(unit))
        _expect(len(samples) == len(second), "a unit has other samples at the second reading")
        for sample in (each for each in samples if not isinstance(each, Rejected)):
            wanted = {"key", *listings[0].features}
            _expect(set(sample) == wanted, f"a sample has {sorted(sample)}, wanted {sorted(wanted)}")
            keys.append(sample["key"])
    _expect(len(set(keys)) == len(keys) > 0, "keys of samples repeat, or there is no sample")
    with tempfile.TemporaryDirectory() as folder:
        settings = PrepareConfig(options=options, parallel="off", shard_rows=8)
        return prepare(name, src, str(Path(folder, "prepared")), settings)


def check_feature(feature: Any, stored: Iterable[Any], damaged: Iterable[Any] = (), *, classes: int = CLASSES) -> None:
    """Check a feature: stored values keep their form in Arrow, are shown as announced; damage is a bad sample.

    Args:
        feature: the feature.
        stored: values of its column.
        damaged: values that must be refused with `BadSample`.
        classes: number of classes of the data.
    """
    import numpy as np
    import pyarrow as pa

    from pipelines.features.base import ViewConfig
    from pipelines.transforms import BadSample

    _expect(registry.offered("feature").get(feature.kind) is type(feature), f"no feature {feature.kind!r} is installed")
    view, stored = ViewConfig(), list(stored)
    shapes = feature.shapes("x", view, classes)
    back = pa.array(stored, feature.arrow).to_pylist()
    for value in back:
        decoded = feature.decode(value, view, classes)
        for training in (True, False):
            shown = feature.show("x", decoded, view, training, lambda: np.random.default_rng(0))
            got = {key: (np.shape(array), np.asarray(array).dtype.type) for key, array in shown.items()}
            wanted = {key: (tuple(shape), kind) for key, (shape, kind) in shapes.items()}
            _expect(got == wanted, f"shown as {got}, announced {wanted}")
    for value in damaged:
        try:
            feature.decode(value, view, classes)
        except BadSample:
            continue
        raise AssertionError(f"the damaged value {value!r} is decoded, wanted BadSample")


def check_hook(config: Config, steps: int = 3) -> None:
    """Check a hook: it is built for each rank and called after a few steps, and returns nothing."""
    from perceiver.train.engine.protocol import StepResult
    from perceiver.train.loop import StepInfo
    from perceiver.train.offered_hooks import build_hooks

    _expect(registry.offered("hook").get(_kind(config)) is type(config), f"no hook {_kind(config)!r} is installed")
    for rank in range(2):
        (hook,) = build_hooks([config], rank, 2)
        for step in range(1, steps + 1):
            result = StepResult(
                step=step - 1, loss=1.0, metrics={"accuracy": 0.5}, grad_norm=1.0, lr=0.1, skipped=False
            )
            info = StepInfo(step, steps, step / steps, 8, 0.1, 0.0, result)
            _expect(cast(Any, hook)(info) is None, "a hook returned a value")


def _kind(config: Config) -> str:
    return str(getattr(config, "kind", ""))


def _check_registered(package: str, config: Config) -> None:
    known = registry.members(package)
    _expect(known.get(_kind(config)) is type(config), f"{_kind(config)!r} is not one of {', '.join(known)}: install it")


def _example(model: Any, size: int) -> Batch:
    """Return random inputs of a model, from the tensors of its `example`."""
    return {
        key: torch.randn_like(value) if value.is_floating_point() else torch.randint_like(value, 0, CLASSES)
        for key, value in model.example(size, "cpu").items()
    }


def _rows(batch: Batch, part: slice) -> Batch:
    return {key: value[part] for key, value in batch.items()}


def _check_gradients(model: nn.Module) -> None:
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    _expect(not without, f"no finite gradient reaches {', '.join(without)}")


def _check_equal(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    for key, value in wanted.items():
        _expect(torch.allclose(got[key], value, rtol=1e-4, atol=1e-4), f"{what} the sum of {key}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
