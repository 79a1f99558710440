"""The live server against its own OpenAPI schema, by schemathesis: requests that it allows and ones that it forbids."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
import schemathesis
from openai import OpenAI
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 40
# answers are short, so that hundreds of them take seconds
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def operations(client: OpenAI) -> Any:
    root = str(client.base_url).removesuffix("/v1/")
    return schemathesis.openapi.from_url(f"{root}/openapi.json")


def bounded(body: Any) -> Any:
    """At most four tokens, and a model that exists, in half of what is sent."""
    if not isinstance(body, dict):
        return body
    for name in LIMITS:
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 4:
            body[name] = 4
    known = isinstance(body.get("model"), str) and len(body["model"]) % 2 == 0
    return {**body, "model": "tiny"} if known else body


def faults_of(operation: Any) -> list[str]:
    """What is wrong with the answers to ``EXAMPLES`` requests; always the same requests."""
    faults: dict[str, str] = {}

    @hypothesis.seed(20)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy())
    def run(case: Any) -> None:
        case.body = bounded(case.body)
        response = case.call(timeout=60)
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            for fault in group.exceptions:
                text = str(fault)
                body = json.dumps(case.body) if isinstance(case.body, dict | list) else repr(case.body)
                faults.setdefault(text, f"{text}\nstatus {response.status_code}, body sent: {body[:600]}")

    run()
    return list(faults.values())


@pytest.mark.slow
def test_no_request_finds_a_fault(client: OpenAI) -> None:
    found = {}
    tested = []
    for result in operations(client).get_all_operations():
        operation = result.ok()
        tested.append(operation.label)
        faults = faults_of(operation)
        if faults:
            found[operation.label] = faults
    assert "POST /v1/chat/completions" in tested
    told = "\n\n".join(f"{label}\n{fault}" for label, faults in found.items() for fault in faults)
    assert not found, told
