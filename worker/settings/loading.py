"""Settings from the environment and a ``.env`` file; all that is wrong at once."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from worker.settings.group import SERVICE_LINK, SettingsError, SettingsGroup, build, is_service_link, read_mounted
from worker.settings.groups import GROUPS, Settings

G = TypeVar("G", bound=SettingsGroup)
H = TypeVar("H", bound=SettingsGroup)
Variables = Mapping[str, str]


@overload
def load(*, environ: Variables = ..., env_file: Path | None = ...) -> Settings: ...
@overload
def load(group: type[G], /, *, environ: Variables = ..., env_file: Path | None = ...) -> G: ...
@overload
def load(
    group: type[G], other: type[H], /, *, environ: Variables = ..., env_file: Path | None = ...
) -> tuple[G, H]: ...
def load(*groups: type[SettingsGroup], environ: Variables = os.environ, env_file: Path | None = Path(".env")) -> Any:
    """All `Settings`; with one group named that group, with two both.

    The environment wins over ``env_file``; an empty variable is unset. Only variables of the wanted groups
    are looked at. Raises `SettingsError` with everything that is wrong.
    """
    problems: list[str] = []
    sources = [_set_ones(environ), _set_ones(_env_file(env_file, problems))]
    problems += _unknown(groups or GROUPS, sources)
    made: list[SettingsGroup] = []
    for group in groups or GROUPS:
        try:
            made.append(build(group, *_texts(group, sources)))
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(problems)
    if not groups:
        return Settings(*made)  # type: ignore[arg-type]  # in the order of GROUPS
    return made[0] if len(made) == 1 else tuple(made)


def _set_ones(source: Variables) -> Variables:
    return {name: value for name, value in source.items() if value != ""}


def _env_file(path: Path | None, problems: list[str]) -> Variables:
    """The variables as written: nothing is expanded, since a secret may well hold ``${``."""
    if path is None or not os.path.lexists(path):
        return {}
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8") as file:
            problem = _untrusted(os.fstat(file.fileno()))
            if problem:
                problems.append(f"{path.name}: {problem}")
                return {}
            lines = list(parse_stream(file))
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror}); make it readable, or remove it")
        return {}
    except UnicodeDecodeError:
        problems.append(f"{path.name}: is not UTF-8 text; save it as UTF-8")
        return {}
    problems += [
        f"{path.name}: line {line.original.line} is not NAME=value; correct or quote it"
        for line in lines
        if line.error or (line.key is not None and line.value is None)
    ]
    return {line.key: line.value or "" for line in lines if line.key is not None}


def _untrusted(status: os.stat_result) -> str:
    """Why a ``.env`` is not to be trusted: who writes it decides where our secrets go. Empty when it is fine."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (uid {status.st_uid}); use a file of your own, or set the variables"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o}); run `chmod go-w .env`"
    return ""


def _unknown(groups: Iterable[type[SettingsGroup]], sources: Iterable[Variables]) -> Iterator[str]:
    known = {group.variable(name) for group in groups for name in group.declared()}
    prefixes = tuple(group.variables for group in groups)
    given = {name: value for source in sources for name, value in source.items()}
    for name in sorted(given.keys() - known):
        if name.startswith(prefixes):
            yield f"{name}: unknown setting; {_suggestion(name, given[name], known)}"


def _suggestion(name: str, value: str, known: Iterable[str]) -> str:
    if re.search(r"_SERVICE_(HOST|PORT)|_PORT_[0-9]+_(TCP|UDP|SCTP)", name) or is_service_link(value):
        return SERVICE_LINK
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else "remove it, no setting has a name like it"


def _texts(group: type[SettingsGroup], sources: Iterable[Variables]) -> tuple[dict[str, str], dict[str, str]]:
    """Field → text, and field → what is wrong with how it was given."""
    texts: dict[str, str] = {}
    wrong: dict[str, str] = {}
    files = group.file_forms()
    for name in (name for name in group.declared() if name not in files.values()):
        variable, forms = group.variable(name), [name, *filter(None, [files.get(name)])]
        # The highest source that has either form settles it: a lower one's other form must not come back.
        given = next(filter(None, (_given(group, forms, source) for source in sources)), {})
        if len(given) == 2:
            wrong[name] = f"{variable}: {group.variable(files[name])} is set as well; keep one of the two"
        elif not all(_is_encodable(value) for value in given.values()):
            wrong[name] = f"{variable}: is not UTF-8 text; correct its encoding"
        elif name in given:
            texts[name] = given[name]
        elif given:
            read_mounted(group, name, Path(given[files[name]]), texts, wrong)
    return texts, wrong


def _given(group: type[SettingsGroup], names: Iterable[str], source: Variables) -> dict[str, str]:
    return {name: source[group.variable(name)] for name in names if group.variable(name) in source}


def _is_encodable(value: str) -> bool:
    """False for bytes of the environment that are no UTF-8: Python carries them as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
