"""YAML documents with a header of comments, texts of several lines kept readable."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and what is the same twice in full."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write no anchors: readers of these files expect none."""
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def as_yaml(header: str, *documents: object) -> str:
    """Return YAML documents below a header of comment lines."""
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header.strip().splitlines())
    texts = [yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120) for document in documents]
    return comments + "---\n".join(texts)
