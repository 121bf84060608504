"""The licence of a source, from its model card or its licence file."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from optima_tpu.config import yaml12
from optima_tpu.errors import UserError

CARD = "README.md"
"""The model card of a folder. The front matter of a source's card names its licence."""

# Whoever shows a card may put these into a page as they are: no sign that HTML, Markdown or YAML reads as markup.
_FILE = re.compile(r"[\w.-]{1,100}")
_FORMS = {
    "license": re.compile(r"[\w.-]{1,100}"),
    "license_name": re.compile(r"\w[\w .+-]{0,99}"),
    "license_link": re.compile(r"https://[\w.~/?#@!$&+,;:=%-]{1,500}|" + _FILE.pattern),
}
_TITLES = {"Apache License": "apache-2.0", "MIT License": "mit"}


class Licence(NamedTuple):
    """A licence by the hub's names.

    Attributes:
      id: such as "apache-2.0" or "gemma"; "other" if the hub has no name for it; None if it is not known.
      name, link: of another licence; the link is an address, or a file of the folder.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None

    def card(self) -> bytes:
        """A model card that says nothing but the licence."""
        data = ModelCardData(license=self.id, license_name=self.name, license_link=self.link)
        return f"---\n{data.to_yaml()}\n---\n".encode()


def licence_of(assets: Mapping[str, bytes]) -> Licence:
    """The licence on a source's model card, otherwise in its licence file.

    Args:
      assets: the source's small files, by name.
    """
    file = next(
        (name for name in sorted(assets) if name.upper().startswith(("LICENSE", "LICENCE")) and _FILE.fullmatch(name)), None
    )
    named = _named(assets.get(CARD, b"").decode("utf-8", "replace"))
    if named.id is not None:
        # A link to a file that is not here leads nowhere.
        link_is_valid = named.link is not None and (named.link in assets or named.link.startswith("https://"))
        return named if link_is_valid else named._replace(link=file if named.id == "other" else None)
    if file is None:
        return Licence()
    head = assets[file][:400].decode("utf-8", "replace")
    licence_id = next((id_ for title, id_ in _TITLES.items() if title in head), None)
    return Licence(licence_id) if licence_id else Licence("other", "source-licence", file)


def _named(card: str) -> Licence:
    """The licence in a card's front matter; without one an empty Licence."""
    match = REGEX_YAML_BLOCK.search(card)
    try:
        front = yaml12.load(match[2]) if match else None
    except UserError:
        front = None
    front = front if isinstance(front, dict) else {}
    id_, name, link = (
        each if isinstance(each := front.get(key), str) and form.fullmatch(each) else None for key, form in _FORMS.items()
    )
    return Licence(id_, name, link) if id_ else Licence()
