"""Parse HTML pages for their tests."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags with their attributes and texts with the tag around them; checks that every element is closed.

    Attributes:
        tags: names and attributes.
        texts: the innermost open tag and the text.
        text: all of it.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    @property
    def words(self) -> list[str]:
        """Return the texts."""
        return [text for _, text in self.texts]

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of each element of that name."""
        return [attrs for name, attrs in self.tags if name == tag]

    def count(self, tag: str) -> int:
        """Return the number of elements of that name."""
        return len(self.all(tag))

    def fetched(self) -> list[str]:
        """Return what a browser would fetch from other addresses."""
        names = ("src", "href", "data", "poster", "action")
        urls = [attrs[name] for _, attrs in self.tags for name in names if name in attrs]
        return [url for url in urls if not url.startswith(("data:", "#"))]
