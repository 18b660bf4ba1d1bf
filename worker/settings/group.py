"""A group of settings: how a setting is declared, how its value is read, and what is wrong with it in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeVar, dataclass_transform

G = TypeVar("G", bound="SettingsGroup")

MAX_SECRET_BYTES: Final = 65_536
"""The path of a secret may lead to a log or a device; reading it must not fill the memory."""


SERVICE_LINK: Final = (
    "Kubernetes sets it for a Service of that name: set enableServiceLinks: false in the pod, or rename the Service"
)
"""A Service ``metrics`` gives every pod METRICS_PORT=tcp://…, and more names that look like settings."""


class SettingsError(Exception):
    """All that is wrong. Each problem is ``VARIABLE: what is wrong, what to do``, and holds no value."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """Text that neither ``str`` nor ``repr`` shows."""

    _text: str

    def get_secret_value(self) -> str:
        """The text in clear, for the code that needs it and for nothing else."""
        return self._text

    def __repr__(self) -> str:
        return "Secret('***')"


@dataclass(frozen=True, slots=True)
class Declared:
    """What is declared about one setting.

    ``rule`` makes the value from the text of the variable. It raises `ValueError` with a text for people that does not
    repeat the value, since that may be a secret in the wrong variable. ``default`` is `MISSING` for a required setting.
    ``shown`` is what the documentation shows as the default where the default itself says nothing.
    """

    rule: Callable[[str], Any]
    meaning: str
    default: Any
    shown: str | None

    def documented(self) -> str:
        """The default in Markdown, as one would write it in the environment; empty where there is none."""
        if self.shown is not None:
            return self.shown
        if self.default is MISSING:
            return "required"
        match self.default:
            case None:
                return ""
            case Secret():
                return f"`{self.default.get_secret_value()}`"
            case bool():
                return f"`{str(self.default).lower()}`"
            case tuple():
                return f"`{','.join(map(str, self.default))}`"
        return f"`{self.default}`"


def setting(rule: Callable[[str], Any], meaning: str, *, default: Any = MISSING, shown: str | None = None) -> Any:
    """Declares one setting; the arguments are those of `Declared`."""
    return field(default=default, metadata={"declared": Declared(rule, meaning, default, shown)})


def mounted(variable: str, *, default: None) -> Any:
    """Declares the path of a mounted file, whose content is the value of ``variable``."""
    return setting(Path, f"Path of a mounted file that holds `{variable}`.", default=default)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting, mounted))
class SettingsGroup:
    """Settings whose variables begin with one prefix. `load` makes them from text; a direct call takes values."""

    variables: ClassVar[str]
    """What the names of the variables begin with, for example ``AMQP_``."""

    def __init_subclass__(cls, *, variables: str) -> None:
        super().__init_subclass__()
        cls.variables = variables
        dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def declared(cls) -> dict[str, Declared]:
        """Field → its declaration, in the order of the documentation."""
        return {each.name: each.metadata["declared"] for each in fields(cls)}  # type: ignore[arg-type]  # by __init_subclass__

    @classmethod
    def variable(cls, name: str) -> str:
        """The name of the variable: ``AMQP_URL`` for the field ``url``."""
        return f"{cls.variables}{name.upper()}"

    @classmethod
    def file_forms(cls) -> dict[str, str]:
        """Field → the field that holds the path of its mounted file."""
        names = cls.declared()
        return {name: f"{name}_file" for name in names if f"{name}_file" in names}

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Field and problem, where values that are valid alone exclude each other.

        ``values`` lacks the fields that are invalid themselves: one complaint about them is enough.
        """
        return iter(())

    def reread(self) -> Self:
        """The same settings with the mounted secrets as they are now. Raises `SettingsError`."""
        texts: dict[str, str] = {}
        wrong: dict[str, str] = {}
        for name, file_field in self.file_forms().items():
            path = getattr(self, file_field)
            if path is not None:
                read_mounted(type(self), name, path, texts, wrong)
        return build(type(self), texts, wrong, others=self)


def read_secret_file(path: Path) -> Secret:
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
    try:
        text = re.sub(r"\r?\n\Z", "", content.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; write the secret into it as text") from None
    if not text:
        raise ValueError("is empty; write the secret into it")
    return Secret(text)


def read_mounted(
    group: type[SettingsGroup], name: str, path: Path, texts: dict[str, str], wrong: dict[str, str]
) -> None:
    """Puts the text of a mounted secret and its path into ``texts``, or what is wrong with it into ``wrong``."""
    file_field = group.file_forms()[name]
    try:
        texts |= {name: read_secret_file(path).get_secret_value(), file_field: str(path)}
    except ValueError as error:
        wrong[name] = f"{group.variable(file_field)}: {error}"


def build(group: type[G], texts: Mapping[str, str], wrong: Mapping[str, str], *, others: G | None = None) -> G:
    """The group, made from the texts of its variables; the other fields are those of ``others``, or defaults.

    Raises one `SettingsError` with ``wrong`` (field → problem) and every rule that is broken.
    """
    problems, values, file_forms = dict(wrong), {}, group.file_forms()

    def variable(name: str) -> str:
        """The variable that people set: the path of the mounted file, where the value came from one."""
        return group.variable(file_forms[name] if file_forms.get(name) in texts else name)

    for name, declared in group.declared().items():
        if name in wrong:
            continue
        if name in texts:
            try:
                if is_service_link(texts[name]):
                    raise ValueError(SERVICE_LINK)
                values[name] = declared.rule(texts[name])
            except ValueError as error:
                problems[name] = f"{variable(name)}: {error}"
        elif others is not None:
            values[name] = getattr(others, name)
        elif declared.default is MISSING:
            either = f" (or {group.variable(file_forms[name])})" if name in file_forms else ""
            meaning = declared.meaning.replace("`", "").rstrip(".")
            problems[name] = f"{variable(name)}: is not set; set it{either}. {meaning}"
        else:
            values[name] = declared.default
    for name, problem in group.conflicts(values):
        problems.setdefault(name, f"{variable(name)}: {problem}")
    if problems:
        raise SettingsError(problems[name] for name in group.declared() if name in problems)
    return group(**values)


def is_service_link(value: str) -> bool:
    """Whether Kubernetes made this value of a variable."""
    return bool(re.match(r"(tcp|udp|sctp)://", value))
