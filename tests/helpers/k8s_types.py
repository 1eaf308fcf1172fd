"""Manifests against the published types of Kubernetes and Kubeflow: a field that does not exist,
one that is missing, a value of another type, as ``kubectl apply --validate=strict`` finds them.

The types are the models in the Python packages of those projects. They are of two kinds: older
ones name the types of their fields in words (``list[V1Container]``), newer ones are pydantic's.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import kubeflow.training.models as kubeflow_models
import kubeflow_trainer_api.models as trainer_models
import kubernetes.client.models as kubernetes_models
from pydantic import BaseModel

QUANTITY = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?")
QUANTITIES = ("limits", "requests", "sizeLimit")  # text in the older models
ENUMS = {
    "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "completionMode": ("Indexed", "NonIndexed"),
    "podReplacementPolicy": ("Failed", "TerminatingOrFailed"),
    "cleanPodPolicy": ("All", "Running", "None"),
    "fsGroupChangePolicy": ("Always", "OnRootMismatch"),
    "medium": ("", "Memory"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "rdzvBackend": ("c10d", "etcd", "etcd-v2"),
}
KINDS = {
    "v1": (kubernetes_models, "V1"),
    "batch/v1": (kubernetes_models, "V1"),
    "jobset.x-k8s.io/v1alpha2": (trainer_models, "JobsetV1alpha2"),
    "trainer.kubeflow.org/v1alpha1": (trainer_models, "TrainerV1alpha1"),
    "kubeflow.org/v1": (kubeflow_models, "KubeflowOrgV1"),
}
Check = Callable[[Any, str], Iterator[str]]


def type_problems(document: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a document, each with its path."""
    api, kind = document.get("apiVersion"), document.get("kind")
    package, prefix = KINDS.get(str(api), (None, ""))
    found = getattr(package, f"{prefix}{kind}", None)
    if found is None:
        yield f"apiVersion, kind: {api} {kind} is not known"
    else:
        yield from model(found)(document, "")


@cache
def model(cls: type) -> Check:
    """The check of a class of either kind."""
    fields = pydantic_fields(cls) if issubclass(cls, BaseModel) else older_fields(cls)
    required = {name for name, (_, needed) in fields.items() if needed}

    def check(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: expected fields, given {value!r}"
            return
        for name in sorted(required - value.keys()):
            yield f"{path}.{name}: missing".lstrip(".")
        for name, inner in value.items():
            where = f"{path}.{name}".lstrip(".")
            if name not in fields:
                yield f"{where}: {cls.__name__} has no such field"
            elif name in ENUMS and inner not in ENUMS[name]:
                yield f"{where}: expected one of {', '.join(ENUMS[name])}, given {inner!r}"
            else:
                yield from fields[name][0](inner, where)

    return check


def older_fields(cls: Any) -> dict[str, tuple[Check, bool]]:
    """Field -> its check, and whether it must be there; setters refuse None where it must."""
    found = {}
    for attribute, words in cls.openapi_types.items():
        name = cls.attribute_map[attribute]
        needed = "must not be `None`" in inspect.getsource(getattr(cls, attribute).fset)
        found[name] = (lazily(older, words, name in QUANTITIES), needed)
    return found


def older(words: str, is_quantity: bool) -> Check:
    """The check of a type in words."""
    if words.startswith("list["):
        return each_item(older(words[5:-1], is_quantity))
    if words.startswith("dict(str, "):
        return each_value(older(words[10:-1], is_quantity))
    if words == "str":
        return quantity if is_quantity else plain(str)
    plains = {"int": int, "bool": bool, "float": float}
    if words in plains:
        return plain(plains[words])
    if words in ("object", "datetime"):
        return anything
    return model(getattr(kubeflow_models, words, None) or getattr(kubernetes_models, words))


def pydantic_fields(cls: type[BaseModel]) -> dict[str, tuple[Check, bool]]:
    """The same of a pydantic model."""
    return {
        field.alias or name: (lazily(newer, field.annotation), field.is_required())
        for name, field in cls.model_fields.items()
    }


def newer(annotation: Any) -> Check:
    """The check of an annotation."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Union:
        (one,) = [part for part in inner if part is not type(None)]
        return newer(one)
    if origin is typing.Annotated:
        return newer(inner[0])
    if origin is list:
        return each_item(newer(inner[0]))
    if origin is dict:
        return each_value(newer(inner[1]))
    if annotation in (str, int, bool, float):
        return plain(annotation)
    name = getattr(annotation, "__name__", "")
    if name.endswith("ResourceQuantity"):
        return quantity
    if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
        return anything
    return anything if name.endswith("IntOrString") else model(annotation)


def lazily(make: Callable[..., Check], *arguments: Any) -> Check:
    """A check that is made when it is first needed: some types hold themselves."""
    return lambda value, path: make(*arguments)(value, path)


def plain(cls: type) -> Check:
    def check(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, cls) or (isinstance(value, bool) and cls is not bool):
            yield f"{path}: expected {cls.__name__}, given {value!r}"

    return check


def quantity(value: Any, path: str) -> Iterator[str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and QUANTITY.fullmatch(value)):
        yield f"{path}: expected a quantity, given {value!r}"


def anything(value: Any, path: str) -> Iterator[str]:
    yield from ()


def each_item(check: Check) -> Check:
    def check_all(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{path}: expected a list, given {value!r}"
            return
        for index, item in enumerate(value):
            yield from check(item, f"{path}.{index}")

    return check_all


def each_value(check: Check) -> Check:
    def check_all(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: expected names and values, given {value!r}"
            return
        for name, item in value.items():
            yield from check(item, f"{path}.{name}")

    return check_all
