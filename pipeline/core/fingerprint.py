"""A name for what decides a result: the same content gives the same name, on every machine."""

import hashlib
import json
from typing import Any


def fingerprint(spec: dict[str, Any]) -> str:
    """Hash of canonical JSON, 16 hex digits: the name of a set of features."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
