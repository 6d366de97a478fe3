"""The JSON Schema of the policy language, from the grammar that reads it (reader.py): for editors to complete from.

`python -m dspark_sgl.policies.schema > policies_yaml/policy.schema.json` writes the shipped copy; a test compares them.
What a schema cannot say (conditions, limits against each other) is left to `dspark-sgl policy lint`.
"""

import json

from .grammar import Json
from .reader import POLICY


def policy_schema() -> Json:
    """The schema as JSON can hold it."""
    schema = POLICY.schema()
    schema["properties"]["version"] = {"const": 1, "description": schema["properties"]["version"]["description"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dspark-sgl policy",
        "description": "How much of a draft is worth the target's time, by load.",
        **schema,
    }


def schema_text() -> str:
    """The shipped file, byte for byte."""
    return json.dumps(policy_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
