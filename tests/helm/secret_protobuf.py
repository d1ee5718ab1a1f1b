"""Secrets as client-go's typed clients send them: helm keeps its releases in some.

As in k8s.io/api/core/v1/generated.proto and k8s.io/apimachinery's runtime.Unknown, without what helm leaves empty.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict, ParseDict

MAGIC = b"k8s\0"
MESSAGES = {
    "TypeMeta": {"apiVersion": (1, "string"), "kind": (2, "string")},
    "Unknown": {"typeMeta": (1, "TypeMeta"), "raw": (2, "bytes")},
    "ObjectMeta": {
        "name": (1, "string"),
        "namespace": (3, "string"),
        "uid": (5, "string"),
        "resourceVersion": (6, "string"),
        "labels": (11, "map of string"),
    },
    "Secret": {"metadata": (1, "ObjectMeta"), "data": (2, "map of bytes"), "type": (3, "string")},
    "ListMeta": {},
    "SecretList": {"metadata": (1, "ListMeta"), "items": (2, "list of Secret")},
}
"""By field: its number, and what it is."""

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {"string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES}


def from_protobuf(data: bytes) -> dict[str, Any]:
    """A Secret; raises ValueError for anything else."""
    if not data.startswith(MAGIC):
        raise ValueError("not in Kubernetes' protobuf")
    envelope = _message("Unknown").FromString(data[len(MAGIC) :])
    if envelope.typeMeta.kind != "Secret":
        raise ValueError(f"a {envelope.typeMeta.kind}, not a Secret")
    return {"apiVersion": "v1", "kind": "Secret"} | MessageToDict(_message("Secret").FromString(envelope.raw))


def to_protobuf(thing: dict[str, Any]) -> bytes:
    """A Secret or a SecretList."""
    content = ParseDict(thing, _message(thing["kind"])(), ignore_unknown_fields=True)
    envelope = _message("Unknown")(raw=content.SerializeToString())
    envelope.typeMeta.apiVersion, envelope.typeMeta.kind = "v1", thing["kind"]
    return MAGIC + bytes(envelope.SerializeToString())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(name))


def _describe() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="kubernetes.proto", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, what) in fields.items():
            own = message.field.add(name=field, number=number, json_name=field)
            many, kind = what.split(" of ") if " of " in what else ("", what)
            own.label = _Field.LABEL_REPEATED if many else _Field.LABEL_OPTIONAL
            if many == "map":
                entry = message.nested_type.add(name=f"{field.capitalize()}Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
                entry.field.add(name="value", number=2, type=_SCALARS[kind], label=_Field.LABEL_OPTIONAL)
                kind = f"{name}.{entry.name}"
            if kind in _SCALARS:
                own.type = _SCALARS[kind]
            else:
                own.type, own.type_name = _Field.TYPE_MESSAGE, f".{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


_pool = _describe()
