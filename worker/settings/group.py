"""A group of settings: its variables, its mounted files, and what is wrong with its values in words."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MaxLen
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

G = TypeVar("G", bound="Group")

MAX_SECRET_BYTES: Final = 65_536
"""A path that leads to a log or a device must not fill the memory."""


class SettingsError(Exception):
    """All that is wrong. Each problem is ``VARIABLE: what is wrong, what to do``, and holds no value."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class Group(BaseSettings):
    """Settings with one prefix. `load` makes them; called directly they take values only."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Values only: `load` alone knows how a ``_FILE`` relates to the plain form in another source."""
        return (init_settings,)

    @classmethod
    def prefix_of_variables(cls) -> str:
        """As ``AMQP_``."""
        return cls.model_config.get("env_prefix", "")

    @classmethod
    def variable(cls, name: str) -> str:
        """The name outside: ``AMQP_URL`` for ``url``."""
        return f"{cls.prefix_of_variables()}{name.upper()}"

    @classmethod
    def file_forms(cls) -> dict[str, str]:
        """Field → the field that holds the path of its mounted file."""
        return {name: f"{name}_file" for name in cls.model_fields if f"{name}_file" in cls.model_fields}

    def reread(self) -> Self:
        """The same settings with mounted secrets as they are now. Raises `SettingsError`."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set}
        wrong: dict[str, str] = {}
        for name, file_field in self.file_forms().items():
            if values.get(file_field) is not None:
                read_mounted(type(self), name, values[file_field], values, wrong)
        return build(type(self), values, wrong)


def read_secret_file(path: Path) -> SecretStr:
    """What a mounted file holds, without its trailing newline. Raises `ValueError` with a text for people."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET_BYTES + 1)
    except FileNotFoundError:
        raise ValueError("no such file; mount it, or correct the path") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); make it readable, or correct the path") from None
    if len(content) > MAX_SECRET_BYTES:
        raise ValueError(f"is larger than {MAX_SECRET_BYTES} bytes; it must hold nothing but the secret")
    if not is_utf8(content):
        raise ValueError("is not UTF-8 text; write the secret into it as text")
    text = re.sub(r"\r?\n\Z", "", content.decode())
    if not text:
        raise ValueError("is empty; write the secret into it")
    return SecretStr(text)


def read_mounted(group: type[Group], name: str, path: Path, values: dict[str, Any], wrong: dict[str, str]) -> None:
    file_field = group.file_forms()[name]
    try:
        values |= {name: read_secret_file(path), file_field: path}
    except ValueError as error:
        wrong[name] = f"{group.variable(file_field)}: {error}"


def build(group: type[G], values: Mapping[str, Any], wrong: Mapping[str, str]) -> G:
    """The group; or all that was wrong before and every broken rule, in one `SettingsError`."""
    found: list[ErrorDetails] = []
    try:
        made = group(**values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    # Raised outside the handler, or the traceback would carry pydantic's error and with it the values.
    problems = [
        *wrong.values(),
        *(_problem(group, values, each) for each in found if each["loc"][0] not in wrong),
    ]
    if problems:
        raise SettingsError(problems)
    return made


def is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _problem(group: type[Group], values: Mapping[str, Any], detail: ErrorDetails) -> str:
    name = str(detail["loc"][0])
    field, file_form = group.model_fields[name], group.file_forms().get(name)
    if detail["type"] == "missing":
        either = f" (or {group.variable(file_form)})" if file_form else ""
        return f"{group.variable(name)}: is not set; set it{either}. {plain(field.description or '')}"
    shown = file_form if file_form in values else name
    if detail["type"] == "value_error":
        return f"{group.variable(str(shown))}: {detail['ctx']['error']}"
    return f"{group.variable(str(shown))}: must be {_expected(field)}"


def _expected(field: FieldInfo) -> str:
    """The rule of a field in words, from its type and bounds."""
    kind = next((kind for kind in _alternatives(field.annotation) if kind is not types.NoneType), str)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return f"a {'whole ' if kind is int else ''}number {_bounds(field)}".rstrip()
    longest = next((rule.max_length for rule in field.metadata if isinstance(rule, MaxLen)), None)
    return f"text of at most {longest} characters" if longest else "text"


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _bounds(field: FieldInfo) -> str:
    words = {Gt: "above {0.gt}", Ge: "of at least {0.ge}", Le: "and at most {0.le}"}
    rules = {type(rule): rule for rule in field.metadata}
    return " ".join(text.format(rules[kind]) for kind, text in words.items() if kind in rules)


def plain(text: str) -> str:
    return text.replace("`", "").rstrip(".")
