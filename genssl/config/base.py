"""Base classes of every configuration block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from genssl.base.home import expand_home
from genssl.config.documents.document import Document


class Section(BaseModel):
    """A mapping with a fixed set of keys; immutable; unknown keys, NaN and infinities are errors.

    Paths, whether settings hold them as Path or as text, have their leading ~ expanded. What is a text and no path is
    named in `free_text`.
    """

    free_text: ClassVar[frozenset[str]] = frozenset({"prompt"})

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any, info: ValidationInfo) -> Any:
        return value if info.field_name in cls.free_text else expand_home(value)


def _ascending(value: tuple[int, ...]) -> tuple[int, ...]:
    if tuple(sorted(set(value))) != value:
        raise ValueError("batch sizes must be in ascending order, each once")
    return value


Buckets = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), AfterValidator(_ascending)]
BUCKETS = (1, 4, 16, 64)


class ComponentConfig(Section):
    """The block of one registered thing, `{name: ..., <its settings>}`.

    A plug-in derives its Config from this class and adds its settings as fields.
    """

    name: str

    def warnings(self) -> list[str]:
        """Returns settings that are allowed but rarely meant, each beginning with the key that it is about."""
        return []

    def unsuited_to(self, dataset: str) -> str | None:
        """Says why this generator is not for the data set of that registry name; None if nothing speaks against it."""
        return None


class Choice(Section):
    """A document whose further keys depend on one of its values; its members derive from it."""

    @classmethod
    def member_for(cls, document: Document) -> type[Choice]:
        """Returns the model that validates this document; raises ConfigError at file:line if there is none."""
        return cls


@dataclass(frozen=True)
class Kind:
    """Marks a field of a document as a `{name: ...}` block, or a list of them, of one registry kind."""

    kind: str
