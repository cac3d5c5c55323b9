"""Passwords and tokens in texts: hidden before anything is printed, logged or stored."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, unquote

MASK = "***"
SHORTEST = 4  # characters of a secret that is also looked for outside URLs; a shorter one would hide half of every text

_URL = re.compile(
    r"(?i)\b(?!file:|sqlite:|parquet:)[a-z][a-z0-9+.-]*://[^\s<>\"']+|(?<=url: )[^\s<>\"']+"
    # A `Path` makes one slash of two. After a scheme that may be a kind of data, as in folder:/photos?size=64, only a user and
    # a password tell a URL.
    r"|\b(?:https?|ftps?|wss?|s3|gs|hf):/[^\s<>\"']+"
    r"|\b(?!file:|sqlite:|parquet:)[a-z][a-z0-9+.-]+:/[^\s<>\"'/:@]+:[^\s<>\"']*@[^\s<>\"']*"
)
_USER_INFO = re.compile(r"(?<=//).*@|(?<=:/)(?!/).*@")  # up to the last "@": a password may contain "@", ":" and "/"
_NO_SECRET_FIELDS = "workflowType|viewStateShareKey"  # of MLflow's pages, whose addresses are printed to be opened
_QUERY_VALUE = re.compile(rf"([?&;#](?!(?:{_NO_SECRET_FIELDS})=)[\w.\[\]-]+=)[^&;#)\],]+")
_ASSIGNED = re.compile(r"(?i)\b([\w-]*(?:password|passwd|secret|api_?key|access_?key|auth_?token|access_?token)=)[^\s,;)'\"&]+")
_HEADER = re.compile(
    r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:(?:basic|bearer|digest)\s+)?)[^\s,'\"]+|(\bbearer\s+)[\w.~+/=-]{8,}"
)
_SECRET_VARIABLE = re.compile(  # PWD alone is the working directory
    r"(?i)((^|_)(password|passwd|secret|token|api_?key|access_?key|credentials?)|_pwd)(_|$)"
)
_NO_SECRET_VARIABLE = re.compile(r"(?i)(path|file|dir|mode|url|uri|host|enabled?|provider)$")
_NO_SECRETS = {"true", "false", "none", "null", "token", "password"}

_PATHS = ("sqlite:", "file:", "/", "./", "../")

_remembered: set[str] = set()


def remember(uri: str) -> None:
    """Hide the secrets of this URI from now on wherever they appear, even in what is no URL."""
    if not uri.startswith(_PATHS):
        _remembered.update(_secrets_of(uri))


def without_secrets(text: str) -> str:
    """`text` with user and password of each URL, the values of its query, and all known secrets replaced by ``***``.

    Known are those of URIs that were given to `remember`, and of the environment: proxies, passwords, tokens, keys.
    """
    for secret in sorted(_remembered | _secrets_of_environment(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _URL.sub(lambda url: _QUERY_VALUE.sub(rf"\1{MASK}", _USER_INFO.sub(f"{MASK}@", url[0])), text)
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    return _HEADER.sub(lambda found: f"{found[1] or found[2]}{MASK}", text)


def _secrets_of(uri: str) -> set[str]:
    """The password, or what stands for one, and the values of the query; also parts of them and other spellings."""
    rest = uri.partition("://")[2] if "://" in uri else uri
    host = re.split(r"[/?#]", rest)[0]
    before, _, after = rest.rpartition("@")
    user, colon, password = before.partition(":")
    # An "@" behind the first "/" belongs to a path, unless what is before it looks like the beginning of a password.
    has_user = "@" in host or (bool(colon) and not host.rpartition(":")[2].isdecimal())
    found = {password or user} if before and has_user and (colon or "://" in uri) else set()
    found |= set(re.findall(r"[?&;#][\w.\[\]-]+=([^&;#]+)", after))
    found |= {spelling for secret in found for spelling in (unquote(secret), quote(secret, safe=""))}
    found |= {part for secret in found for part in re.split(r"[@:/?#]", secret)}  # a client may split it in the wrong place
    return {secret for secret in found if len(secret) >= SHORTEST and secret.lower() not in _NO_SECRETS}


def _secrets_of_environment() -> set[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if "://" in value and "\n" not in value:
            found |= _secrets_of(value)
        elif _is_secret(name, value):
            found |= {value} - _NO_SECRETS
    return found


def _is_secret(name: str, value: str) -> bool:
    """Whether this variable of the environment holds a secret: by its name, and no place on this machine."""
    named = bool(_SECRET_VARIABLE.search(name)) and not _NO_SECRET_VARIABLE.search(name)
    return named and len(value) >= SHORTEST and not (value.startswith("/") and os.path.exists(value))
