"""What must not stand in a record: secrets, and the home folder."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MASK = "***"
_LEAST = 6  # Characters of a secret; shorter ones are words.
_NAMES = r"(?:api|access|private|secret|auth|account)[_-]?keys?|(?:auth[_-]?)?tokens?|secrets?|passw(?:or)?d|passphrase"
_NAMED = re.compile(rf"(?:.*[_./-])?(?:{_NAMES}|pwd|credentials?|authorization|bearer)", re.IGNORECASE)
_OF_A_VOCABULARY = re.compile(
    r"(?:.*[_./-])?(?:(?:pad|eos|bos|unk|mask|sep|cls|start|end|image)_token|(?:special|added|extra)_tokens)",
    re.IGNORECASE,
)
_OF_ENVIRONMENT = re.compile(rf"(?:.*_)?(?:{_NAMES}|pass|pwd|credentials?|auth)(?:_.*)?|.*_key", re.IGNORECASE)
_PLACES = {"PWD", "OLDPWD", "SSH_AUTH_SOCK"}  # Named like secrets, and none.
_KNOWN = re.compile(
    r"""
    -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----.*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    | \b(?:hf|api_org)_[A-Za-z0-9]{16,}            # Hugging Face
    | \bsk-[A-Za-z0-9_-]{16,}                       # OpenAI, Anthropic
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_[A-Za-z0-9_]{20,} | \bglpat-[A-Za-z0-9_-]{16,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bAIza[0-9A-Za-z_-]{30,}
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,}
    | \beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}   # JSON web tokens
    | (?<=://)[^\s/:@'"]*:[^\s/@'"]+(?=@)           # user:password@host
    """,
    re.VERBOSE | re.DOTALL,
)
# Of requests: headers, and addresses that are signed.
_GIVEN = re.compile(
    rf"""(?P<name>(?:\bbearer|\bauthorization["']?\s*[:=]\s*["']?\w+)\s+(?=\S{{16}})"""
    rf"""|[?&](?:[\w.-]*(?:{_NAMES})|sig|[\w-]*signature|[\w-]*credential)=(?=\S{{8}}))[\w.~+/%=-]+""",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    rf"""(?P<name>\b[\w-]*(?:{_NAMES})["']?\]?\s*(?::\s*\w+\s*=|[:=])\s*[bru]?)"""
    r"""(?P<quote>["'])(?P<value>[^"'\s]{8,})(?P=quote)""",
    re.IGNORECASE,
)
_OPTION = re.compile(r"(?P<name>[-+]{0,2}[\w.-]+)(?:=(?P<value>.*))?", re.DOTALL)
_HOMES = re.compile(r"(?<![\w.~-])(?:/home|/Users|/var/home|[A-Za-z]:\\Users)[/\\][^/\\\s'\":;,]+")


class Masks:
    """Masks what is secret in texts: what secret variables of the environment hold, and what looks like a token.

    >>> masks = Masks({"WANDB_API_KEY": "0123456789abcdef"}, home="/home/ada")
    >>> masks.text("wandb 0123456789abcdef of /home/ada/runs, https://ada:lovelace@host/")
    'wandb *** of ~/runs, https://***@host/'
    >>> masks.command(["train.py", "--api-key", "swordfish", "--rate=0.1", "--password=1234"])
    ['train.py', '--api-key', '***', '--rate=0.1', '--password=***']

    Args:
      environment: variables by name.
      home: the home folder, of which `~` is written.
    """

    def __init__(self, environment: Mapping[str, str], home: str) -> None:
        values = {
            value
            for name, value in environment.items()
            if len(value) >= _LEAST and name not in _PLACES and _OF_ENVIRONMENT.fullmatch(name)
        }
        self._secrets = re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None
        home = home.rstrip("/\\")
        self._home = re.compile(rf"(?<![\w.~-]){re.escape(home)}(?![\w.-])") if home else None

    @classmethod
    def of_this_process(cls) -> "Masks":
        """Those of the environment and the home folder of this process."""
        return cls(os.environ, str(Path.home()))

    def text(self, text: str) -> str:
        """A text without what is secret."""
        text = self._without_secrets(text)
        return _HOMES.sub("~", text if self._home is None else self._home.sub("~", text))

    def program(self, text: str) -> str:
        """A text of a program, or a patch of one, without what is secret."""
        text = self._without_secrets(text)
        return text if self._home is None else self._home.sub("~", text)  # A home of nobody here is an example.

    def _without_secrets(self, text: str) -> str:
        text = _ASSIGNED.sub(lambda found: f"{found['name']}{found['quote']}{MASK}{found['quote']}", text)
        text = _GIVEN.sub(lambda found: f"{found['name']}{MASK}", _KNOWN.sub(MASK, text))
        return text if self._secrets is None else self._secrets.sub(MASK, text)

    def command(self, words: list[str]) -> list[str]:
        """The words of a command line without what is secret, and what is given to an option of a secret's name."""
        masked, is_next = [], False
        for word in words:
            found = _OPTION.fullmatch(word)
            is_secret = found is not None and _NAMED.fullmatch(found["name"].lstrip("-+")) is not None
            if is_next and not word.startswith("--"):
                masked.append(MASK)
            elif is_secret and found is not None and found["value"] is not None:
                masked.append(f"{found['name']}={MASK}")
            else:
                masked.append(self.program(word))  # As it is behind -c.
            is_next = is_secret and found is not None and found["value"] is None and word.startswith("-")
        return masked

    def values(self, value: Any, name: str = "") -> Any:
        """What JSON can hold without what is secret in it, and without texts at and below the name of a secret.

        >>> Masks({}, home="").values({"db": {"password": "1234"}, "secrets": {"db": "1234"}, "max_tokens": 8})
        {'db': {'password': '***'}, 'secrets': {'db': '***'}, 'max_tokens': 8}
        """
        if isinstance(value, Mapping):
            below = name if _is_secret(name) else ""
            return {self.text(key): self.values(each, below or key) for key, each in value.items()}
        if isinstance(value, list):
            return [self.values(each, name) for each in value]
        if not isinstance(value, str):
            return value
        return MASK if value and _is_secret(name) else self.text(value)

    def texts(self, value: Any) -> Any:
        """What JSON can hold without what is secret in its texts, whatever they are called."""
        if isinstance(value, Mapping):
            return {self.text(key): self.texts(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self.texts(each) for each in value]
        return self.text(value) if isinstance(value, str) else value


def _is_secret(name: str) -> bool:
    return _NAMED.fullmatch(name) is not None and _OF_A_VOCABULARY.fullmatch(name) is None
