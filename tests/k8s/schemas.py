"""What each kind may look like: Kubernetes' own schemas, KubeRay's, and for the rest the fields that we use."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # ships no types
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from tests.k8s.view import Doc, View

# The oldest that the manifests are for (matchLabelKeys of a pod affinity is on by default from here), and a newer one.
VERSIONS = ("1.31", "1.34")
CRDS = Path(__file__).parent / "crds"
# Of kinds whose schemas are no part of Kubernetes: every field that the manifests use, at most. A leaf is a type.
TEXT: Doc = {"type": "string"}
NUMBER: Doc = {"type": "integer"}
FREE: Doc = {}


def _object(required: str = "", **fields: Any) -> Doc:  # noqa: ANN401 - JSON schema
    closed = {"type": "object", "properties": fields, "additionalProperties": False}
    return {**closed, "required": required.split()}


def _list(items: Doc) -> Doc:
    return {"type": "array", "minItems": 1, "items": items}


_SELECTOR = _object(
    matchLabels=FREE, matchExpressions=_list(_object("key operator", key=TEXT, operator=TEXT, values=FREE))
)
_SPECS: Mapping[tuple[str, str], Doc] = {
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector podMetricsEndpoints",
        selector=_SELECTOR,
        podTargetLabels=_list(TEXT),
        podMetricsEndpoints=_list(_object("port", port=TEXT, interval=TEXT)),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): FREE,  # cluster/metrics tests hold it to the names that exist
    ("gateway.networking.k8s.io/v1", "Gateway"): _object(
        "gatewayClassName listeners",
        gatewayClassName=TEXT,
        listeners=_list(
            _object(
                "name port protocol",
                name=TEXT,
                hostname=TEXT,
                port=NUMBER,
                protocol={"enum": ["HTTP", "HTTPS", "TLS"]},
                tls=_object(
                    mode={"enum": ["Terminate", "Passthrough"]}, certificateRefs=_list(_object(kind=TEXT, name=TEXT))
                ),
                allowedRoutes=_object(namespaces=_object("from", **{"from": {"enum": ["All", "Same", "Selector"]}})),
            )
        ),
    ),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _object(
        "parentRefs rules",
        parentRefs=_list(_object("name", name=TEXT, sectionName=TEXT)),
        hostnames=_list(TEXT),
        rules=_list(
            _object(
                matches=_list(_object("method", method=_object("service", service=TEXT, method=TEXT))),
                backendRefs=_list(_object("name port", name=TEXT, port=NUMBER)),
            )
        ),
    ),
    ("external-secrets.io/v1", "ExternalSecret"): _object(
        "secretStoreRef target data",
        refreshInterval=TEXT,
        secretStoreRef=_object("kind name", kind=TEXT, name=TEXT),
        target=_object("name", name=TEXT),
        data=_list(_object("secretKey remoteRef", secretKey=TEXT, remoteRef=_object("key", key=TEXT, property=TEXT))),
    ),
}


def problems(view: View) -> Iterator[str]:
    """Every place where a document is not what its schema allows."""
    for doc in view.docs:
        name = f"{doc['kind']}/{doc['metadata']['name']}"
        key = (doc["apiVersion"], doc["kind"])
        if key == ("ray.io/v1", "RayService"):
            found = _by_schema(_ray_service(), doc)
            found = [*found, *_repeated_keys(_raw_ray_service(), doc)]
        elif key in _SPECS:
            found = _by_schema(Draft202012Validator(_SPECS[key]), doc["spec"])
        else:
            found = list(_core(doc))
        yield from (f"{name}: {text}" for text in found)
    yield from serve_problems(view)


def _by_schema(validator: Draft202012Validator, value: Doc) -> list[str]:
    return [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in validator.iter_errors(value)
    ]


def _core(doc: Doc) -> tuple[str, ...]:
    return _core_of(json.dumps(doc, sort_keys=True))


@functools.cache
def _core_of(text: str) -> tuple[str, ...]:
    """By the document's text, because most documents of most tests are the same."""
    doc, found = json.loads(text), []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(doc, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            found.append(f"no schema for {doc['apiVersion']} in Kubernetes {version}")
        except kubernetes_validate.ValidationError as error:
            found.append(f"{'/'.join(map(str, error.path))}: {error.message[:200]}")
    return tuple(found)


@functools.cache
def _raw_ray_service() -> Doc:
    schema: Doc = json.loads((CRDS / "rayservice-v1.json").read_text())
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own part
    return schema


@functools.cache
def _ray_service() -> Draft202012Validator:
    return Draft202012Validator(closed(_raw_ray_service()))


def closed(schema: Any) -> Any:  # noqa: ANN401 - JSON schema
    """A CRD's schema as strict validation applies it: a field that is not listed is an error.

    By itself a CRD lets unknown fields pass, and the API server drops them without a word.
    """
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "default"}
    for key in ("items", "additionalProperties", "anyOf", "allOf", "oneOf", "not"):
        if key in out:
            out[key] = closed(out[key])
    if "properties" in out:
        properties = out["properties"]
        out["properties"] = {name: closed(part) for name, part in properties.items()}
        # Defaults are filled in before the check.
        out["required"] = [name for name in out.get("required", []) if "default" not in properties[name]]
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return out


def _repeated_keys(schema: Doc, value: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401 - JSON
    """Entries of a list that is a map by some of their fields (env by name, ports by number) and come twice."""
    if isinstance(value, list):
        items = schema.get("items", {})
        keys = schema.get("x-kubernetes-list-map-keys", [])
        defaults = {key: items.get("properties", {}).get(key, {}).get("default") for key in keys}
        seen = [
            tuple(entry.get(key, defaults[key]) for key in keys) for entry in value if keys and isinstance(entry, dict)
        ]
        yield from (
            f"{path}: {entry} comes twice"
            for entry in sorted(set(map(str, seen)))
            if list(map(str, seen)).count(entry) > 1
        )
        for index, entry in enumerate(value):
            yield from _repeated_keys(items, entry, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, part in value.items():
            below = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield from _repeated_keys(below, part, f"{path}.{name}")


def serve_problems(view: View) -> Iterator[str]:
    """What Ray would refuse of serveConfigV2, and what it would leave unread: its schemas let unknown fields pass."""
    try:
        ServeDeploySchema.model_validate(view.serve)
    except ValidationError as error:
        yield from (f"serveConfigV2: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    yield from _unread(ServeDeploySchema, view.serve, "serveConfigV2")


def _unread(model: type[BaseModel], values: Doc, path: str) -> Iterator[str]:
    known = {field.alias or name: field for name, field in model.model_fields.items()} | dict(model.model_fields)
    for name, value in values.items():
        if name not in known:
            yield f"{path}.{name}: Serve reads no such field"
            continue
        for below in _models(known[name].annotation):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, dict):
                    yield from _unread(below, part, f"{path}.{name}")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401 - whatever a field is annotated with
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)
