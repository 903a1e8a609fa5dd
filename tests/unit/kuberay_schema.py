"""Answers which fields cluster/'s Kubernetes manifests may have: a strict JSON schema of what they use.

Not KubeRay's own schema, which no package brings: fields that are not listed are refused, so that a misspelt one,
which Kubernetes would drop without a word, is found here. What may be unsafe (privileges, host network, another
service type) cannot be said at all. Names as in KubeRay's API reference, ray.io/v1.
"""

from __future__ import annotations

from typing import Any


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
METADATA = _object({"name": NAME})
AMOUNTS = _object(
    {
        "cpu": {"type": "string", "pattern": r"^\d+m?$"},
        "memory": {"type": "string", "pattern": r"^\d+[MG]i$"},
    },
    {"nvidia.com/gpu": {"type": "string", "pattern": r"^\d+$"}},
)
CONTAINER = _object(
    {
        "name": NAME,
        "image": TEXT,
        "securityContext": _object(
            {
                "allowPrivilegeEscalation": {"const": False},
                "capabilities": _object({"drop": {"const": ["ALL"]}}),
            }
        ),
        "resources": _object({"requests": AMOUNTS, "limits": AMOUNTS}),
        "volumeMounts": _list(_object({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}})),
    }
)
VOLUME = {
    "oneOf": [
        _object({"name": NAME, "persistentVolumeClaim": _object({"claimName": NAME})}),
        _object({"name": NAME, "emptyDir": _object({"medium": {"const": "Memory"}, "sizeLimit": TEXT})}),
    ]
}
POD = _object(
    {
        "securityContext": _object(
            {
                "runAsNonRoot": {"const": True},
                "runAsUser": {"type": "integer", "minimum": 1},
                "fsGroup": COUNT,
            }
        ),
        "containers": _list(CONTAINER),
        "volumes": _list(VOLUME),
    },
    {
        "nodeSelector": TEXTS,
        "tolerations": _list(
            _object({"key": TEXT, "operator": {"enum": ["Exists", "Equal"]}, "effect": TEXT}, {"value": TEXT})
        ),
    },
)
TEMPLATE = _object({"spec": POD})
CLUSTER = _object(
    {
        "rayVersion": TEXT,
        "authOptions": _object({"mode": {"const": "token"}}),
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": _object({"idleTimeoutSeconds": COUNT}),
        "headGroupSpec": _object(
            {"serviceType": {"const": "ClusterIP"}, "rayStartParams": TEXTS, "template": TEMPLATE}
        ),
        "workerGroupSpecs": _list(
            _object(
                {
                    "groupName": NAME,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": TEXTS,
                    "template": TEMPLATE,
                }
            )
        ),
    }
)
JOB = _object(
    {
        "entrypoint": TEXT,
        "shutdownAfterJobFinishes": {"const": True},
        "ttlSecondsAfterFinished": COUNT,
        "backoffLimit": COUNT,
        "rayClusterSpec": CLUSTER,
    }
)
SELECTOR = _object({"matchLabels": {**TEXTS, "minProperties": 1}})
POLICY = _object(
    {
        "podSelector": SELECTOR,
        "policyTypes": {"const": ["Ingress"]},
        "ingress": _list(
            _object(
                {"from": _list(_object({"podSelector": SELECTOR}, {"namespaceSelector": {"type": "object"}}))}
            )
        ),
    }
)


def _document(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}
    )


SCHEMAS = {
    "RayCluster": _document("ray.io/v1", "RayCluster", CLUSTER),
    "RayJob": _document("ray.io/v1", "RayJob", JOB),
    "NetworkPolicy": _document("networking.k8s.io/v1", "NetworkPolicy", POLICY),
}
