"""Finds what a recipe can name: our modalities, tasks and models, one file each, and what installed packages offer.

To add one here, add a file with a config class that has `kind` and `build`. Packages declare sources, features,
modalities, tasks, models and hooks as entry points of the groups `perceiver.sources` and so on (docs/plugins.md);
nothing is imported because a recipe names a module or a file.
"""

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Union

from pydantic import Field

import perceiver_train
from perceiver.config import Config, UserError, shown

PACKAGES = {"perceiver.modalities": "modality", "perceiver.tasks": "task", "perceiver.baselines": "model"}
"""What the modules of a package are, for plug-ins."""
MODELS = ("perceiver", "perceiver_io")
"""Models that are not in `perceiver.baselines` (`perceiver.factory`)."""

OURS = "perceiver-train"
KINDS = {
    "source": "an object with title, listing and samples",
    "feature": "a subclass of pipelines.features.base.BaseFeature",
    "modality": "a subclass of perceiver.config.Config with kind and build",
    "task": "a subclass of perceiver.config.Config with kind and build",
    "model": "a subclass of perceiver.config.Config with kind and build",
    "hook": "a subclass of perceiver.config.Config with kind and build",
}
"""What a package can offer, and what its entry point must name."""
_PLURALS = {"modality": "modalities"}


@cache
def members(package: str) -> dict[str, type[Config]]:
    """Return the config classes of a package's modules by kind, and those that installed packages offer.

    A class counts if it is defined in the module, has a field `kind` with a default, and a method `build`.

    Raises:
        UserError: two packages offer the same kind.
    """
    found: dict[str, type[Config]] = {}
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        for item in vars(module).values():
            own = isinstance(item, type) and issubclass(item, Config) and item.__module__ == module.__name__
            if own and hasattr(item, "build") and "kind" in item.model_fields:
                found[item.model_fields["kind"].default] = item
    kind = PACKAGES[package]
    return found | offered(kind, [*found, *MODELS] if kind == "model" else found)


def union(*groups: dict[str, type[Config]]) -> Any:
    """Return the pydantic union of config classes, discriminated by `kind`."""
    classes = tuple(cls for group in groups for cls in group.values())
    return classes[0] if len(classes) == 1 else Annotated[Union[classes], Field(discriminator="kind")]  # noqa: UP007


@dataclass(frozen=True)
class Plugin:
    """A thing that an installed package offers.

    Attributes:
        kind: one of `KINDS`.
        name: in recipes and commands.
        package: the distribution, `name==version`.
        value: the object that the entry point names.
    """

    kind: str
    name: str
    package: str
    value: Any


def group(kind: str) -> str:
    """Return the group of entry points of a kind, such as `perceiver.tasks`."""
    return f"perceiver.{_PLURALS.get(kind, kind + 's')}"


@cache
def plugins(kind: str) -> Mapping[str, Plugin]:
    """Import what installed packages offer of a kind; return it by name.

    A package whose import fails, or that offers something else, is left out with one line on stderr.

    Args:
        kind: one of `KINDS`.

    Raises:
        UserError: two packages offer the same name.
    """
    found: dict[str, Plugin] = {}
    owners: dict[str, str] = {}
    for point in sorted(_points(kind), key=lambda point: (point.name, _package(point))):
        package = _package(point)
        _check_owner(kind, point.name, owners.setdefault(point.name, package), package)
        try:
            value = point.load()
            wrong = _wrong(kind, point.name, value)
        except Exception as error:  # noqa: BLE001  a plug-in can raise anything; it must not stop the others
            value, wrong = None, shown(f"{type(error).__name__}: {error}", 200)
        if wrong:
            print(f"note: the {kind} {point.name!r} of {package} is left out ({point.value}: {wrong})", file=sys.stderr)
        else:
            found[point.name] = Plugin(kind, point.name, package, value)
    return found


def offered(kind: str, taken: Collection[str] = ()) -> dict[str, Any]:
    """Return what installed packages offer of a kind, by name.

    Args:
        kind: one of `KINDS`.
        taken: names of our own of this kind.

    Raises:
        UserError: two packages offer the same name, or one offers one of ours.
    """
    for point in _points(kind):
        if point.name in taken:
            _check_owner(kind, point.name, OURS, _package(point))
    return {name: plugin.value for name, plugin in plugins(kind).items()}


def packages_of(configs: Collection[type[Config]]) -> set[str]:
    """Return the packages, `name==version`, that offer one of some configuration classes."""
    return {plugin.package for kind in KINDS for plugin in plugins(kind).values() if plugin.value in configs}


def _check_owner(kind: str, name: str, owner: str, package: str) -> None:
    """Raise a UserError if a name is of another package."""
    if owner != package:
        raise UserError(
            f"{owner} and {package} both offer the {kind} {name!r} ({group(kind)}): uninstall one of them, or rename "
            "it there"
        )


def installed(package: str) -> bool:
    """Return whether a distribution is installed here, by `name==version`; another version does not count."""
    name, _, version = package.partition("==")
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


def _points(kind: str) -> importlib.metadata.EntryPoints:
    return perceiver_train.entry_points().select(group=group(kind))


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name}=={point.dist.version}" if point.dist is not None else "an unknown package"


def _wrong(kind: str, name: str, value: Any) -> str:
    """Return why an object cannot be used as a kind; empty if it can."""
    if kind == "source":
        return "" if all(hasattr(value, part) for part in ("title", "listing", "samples")) else f"wanted {KINDS[kind]}"
    field = value.model_fields.get("kind") if isinstance(value, type) and issubclass(value, Config) else None
    needs = "decode" if kind == "feature" else "build"
    if field is None or not hasattr(value, needs):
        return f"wanted {KINDS[kind]}"
    return "" if field.default == name else f"its kind is {field.default!r}, wanted the name of the entry point"
