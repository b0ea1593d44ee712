"""Makes Accelerate accept every registered backend: `DynamoBackend` takes the names that torch knows.

Accelerate passes a backend's name on to `torch.compile`, after looking it up in its own enum. The enum is closed, so it rejects
a backend that registers itself the way torch documents (the entry points `torch_dynamo_backends`).
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import DynamoBackend


def take_registered_names() -> None:
    """From now on `DynamoBackend("NAME")` has a member for each `name` of `torch._dynamo.list_backends()`."""
    DynamoBackend._missing_ = classmethod(_member)


def _member(cls: Any, value: object) -> Any:
    """The member of a registered backend, made when it is first asked for; None if torch does not know the name either."""
    from torch._dynamo import list_backends  # takes seconds, and only a name that Accelerate does not know needs it

    name = str(value).upper()  # as Accelerate spells them; it passes them on in lower case
    if name in cls._member_map_:
        return cls._member_map_[name]
    if name.lower() not in list_backends(exclude_tags=()):
        return None
    member = str.__new__(cls, name)
    member._name_ = member._value_ = name
    cls._member_map_[name] = cls._value2member_map_[name] = member
    cls._member_names_.append(name)
    return member
