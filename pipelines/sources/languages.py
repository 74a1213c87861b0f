"""Short texts in ten languages: the translations in the Django package (BSD-3), labelled by language.

A text is held out by the hash of its English original, so that no sentence is in both splits in two languages.
"""

import ast
import hashlib
import random
import re
import zipfile
from collections.abc import Iterator, Mapping

from perceiver.config import UserError
from pipelines.features import LabelFeature, TextFeature
from pipelines.packages import Package, fetch
from pipelines.sources import Listing, Sample, Unit, refuse_options
from pipelines.sources._common import share, units_of

PACKAGE = Package(
    "django==5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
)
LANGUAGES = ("en", "de", "fr", "es", "it", "pl", "tr", "ru", "el", "ar")
MEMBER = re.compile(r"django/.*/locale/(\w+)/LC_MESSAGES/(\w+)\.po$")
SHORTEST = 10
PARTS = 5


def messages(catalogue: str) -> Iterator[tuple[str, str]]:
    """Yield (original, translation) of each entry of a gettext catalogue that is not fuzzy; untranslated: empty.

    Of plural forms the first one is taken.
    """
    for entry in re.split(r"\n\s*\n", catalogue):
        if re.search(r"^#,.*\bfuzzy\b", entry, re.MULTILINE):
            continue
        fields: dict[str, str] = {}
        name = ""
        for line in entry.splitlines():
            if found := re.match(r'(msgid|msgstr)(?:\[0\])?\s+(".*")$', line):
                name = found[1]
                fields[name] = ast.literal_eval(found[2])
            elif line.startswith('"') and name:
                fields[name] += ast.literal_eval(line)
            else:
                name = ""
        if fields.get("msgid"):
            yield fields["msgid"], fields.get("msgstr", "")


def read_archive(path: str) -> list[tuple[str, str, str, str]]:
    """Return all texts as (key, original, text, language), each once, in the package's order."""
    found: list[tuple[str, str, str, str]] = []
    seen: set[tuple[str, str]] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.namelist()):
                place = MEMBER.match(member)
                if place and place[1] in LANGUAGES:
                    for number, (original, text) in enumerate(messages(archive.read(member).decode("utf-8"))):
                        text = original if place[1] == "en" else text
                        different = place[1] == "en" or text != original
                        if len(text) >= SHORTEST and different and (text, place[1]) not in seen:
                            seen.add((text, place[1]))
                            found.append((f"{member}#{number}", original, text, place[1]))
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is not a readable archive ({error}): wanted the file {PACKAGE.file}") from error
    if not found:
        raise UserError(f"{path} contains no translations: wanted the file {PACKAGE.file}")
    return found


class Languages:
    """The source: texts of at least ten characters and their language.

    Option: `share` (of the training texts that are taken, 1), to see what labels are worth.
    """

    title = "short texts in 10 languages (translations in the Django package)"

    def listing(self, src: str | None, *, seed: int, shard_rows: int, options: Mapping[str, str]) -> Listing:
        """List the texts; `src` is a copy of the package's file, downloaded if None."""
        refuse_options(options, ("share",))
        taken = share(options, "share", "0.1") if "share" in options else 1.0
        splits: dict[str, list[int]] = {"train": [], "test": []}
        for row, (_, original, _, _) in enumerate(read_archive(str(src) if src else str(fetch(PACKAGE)))):
            part = int(hashlib.md5(original.encode(), usedforsecurity=False).hexdigest(), 16) % PARTS
            splits["test" if part == 0 else "train"].append(row)
        for rows in splits.values():
            random.Random(seed).shuffle(rows)
        splits["train"] = splits["train"][: max(1, round(taken * len(splits["train"])))]
        units = units_of(splits, shard_rows, "rows", path=src)
        features = {"text": TextFeature(), "label": LabelFeature()}
        licence, origin = "Django and its translators, BSD-3-Clause", f"{PACKAGE.requirement}, django/**/*.po"
        return Listing("languages", features, LANGUAGES, licence, origin, units)

    def samples(self, unit: Unit) -> Iterator[Sample]:
        """Yield the unit's texts."""
        texts = read_archive(unit.content["path"] or str(fetch(PACKAGE)))
        for row in unit.content["rows"]:
            key, _, text, language = texts[row]
            yield {"key": key, "text": text, "label": LANGUAGES.index(language)}


source = Languages()
