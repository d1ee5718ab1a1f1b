"""Writes what of the chart is made from something else: the schema of `config`, the table of values, and the dashboard.

Run: python helm/generate.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from dashboard import dashboard

from tailserve.cluster.config import TailserveConfig

CHART = Path(__file__).with_name("tailserve")
BEGIN, END = "<!-- values -->\n", "<!-- end of values -->\n"


def schema() -> dict[str, Any]:
    """The schema of the values, that of `config` being the application's own."""
    whole: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
    config = TailserveConfig.model_json_schema()
    whole["definitions"] = _draft_7(config.pop("$defs"))
    config["description"] = "of the application: the fields of TailserveConfig"
    whole["properties"]["config"] = _draft_7(config)
    return whole


def _draft_7(part: Any) -> Any:
    """What helm 3 reads, from pydantic's draft 2020-12."""
    if isinstance(part, list):
        return [_draft_7(item) for item in part]
    if not isinstance(part, dict):
        return part
    result = {key: _draft_7(value) for key, value in part.items()}
    if "$ref" in result:
        # Beside a reference draft 7 reads nothing.
        return {"$ref": result["$ref"].replace("#/$defs/", "#/definitions/")}
    if "prefixItems" in result:
        result["items"] = result.pop("prefixItems")
    return result


def table(schema: dict[str, Any], values: dict[str, Any]) -> Iterator[str]:
    """A row for each value."""
    yield "| value | default | meaning |\n|---|---|---|\n"
    for name, default, meaning in _rows("", schema, values):
        shown = json.dumps(default).replace("|", "\\|")
        yield f"| `{name}` | `{shown if len(shown) < 60 else '...'}` | {meaning} |\n"


def _rows(prefix: str, schema: dict[str, Any], values: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, part in schema["properties"].items():
        if name not in values and not prefix:
            continue
        default = values.get(name)
        meaning = part.get("description") or schema["description"]
        if "properties" in part and name != "config" and isinstance(default, dict):
            yield from _rows(f"{prefix}{name}.", part, default)
        elif name == "workerGroups":
            yield name, [group["name"] for group in values[name]], meaning
            properties = part["items"]["properties"]
            yield from ((f"{name}[].{key}", values[name][0].get(key), row["description"]) for key, row in properties.items())
        else:
            yield f"{prefix}{name}", default, meaning


def generated() -> dict[Path, str]:
    """Files, and what they should hold."""
    whole = schema()
    readme = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return {
        CHART / "values.schema.json": json.dumps(whole, indent=2) + "\n",
        CHART / "dashboards" / "tailserve.json": json.dumps(dashboard(), indent=2) + "\n",
        CHART / "README.md": before + BEGIN + "".join(table(whole, values)) + END + after,
    }


if __name__ == "__main__":
    stale = {path: text for path, text in generated().items() if path.read_text() != text}
    if "--check" in sys.argv[1:]:
        sys.exit(", ".join(f"{path} is not up to date: run python helm/generate.py" for path in stale) or 0)
    for path, text in stale.items():
        path.write_text(text)
