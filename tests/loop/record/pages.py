"""A page, taken apart: what it holds, and what it would load or run."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "input", "hr"}
KNOWN = set(
    """html head meta title style body header footer section h1 h2 h3 p b div ul li dl dt dd span pre table thead tbody
    tr th td details summary figure img svg g path defs clippath rect text use""".split()  # noqa: SIM905
)


class Page(HTMLParser):
    """Its text, its elements, and all their attributes.

    Raises:
      AssertionError: it is no whole document, or has an element that no report has.
    """

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        assert tag in KNOWN, tag
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in KNOWN, tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        """What one reads."""
        return " ".join(" ".join(self.texts).split())

    def of(self, tag):
        """The attributes of all elements of a kind."""
        return [attributes for each, attributes in self.elements if each == tag]

    def runs_or_loads(self):
        """What it would run, or load from elsewhere."""
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                own = value is None or value.startswith(("#", "data:image/png;base64,"))
                if name.startswith("on") or (name in ("src", "href", "xlink:href", "action", "srcdoc") and not own):
                    yield tag, name, value
                if "url(" in (value or "").replace("url(#", "") and name in ("style", "clip-path", "fill"):
                    yield tag, name, value
