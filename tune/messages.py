"""Errors of a search file in one line, in the manner of the recipes'."""

import difflib

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first mistake of a validation as one line, an unknown key with the nearest one of the model."""
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    # Behind the key of a section that is one of several comes its kind, which is no key of the file.
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    context = first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, list(model.model_fields), 1, cutoff=0.5)
            return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "") + more
        case "missing":
            return f"the key {key} is missing{more}"
        case "union_tag_not_found":
            return f"the key {key}.kind is missing{more}"
        case "union_tag_invalid":
            kinds = context["expected_tags"].replace("'", "")
            return f"{key}.kind = {context['tag']!r}: wanted one of {kinds}{more}"
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            return (f"{key}: " if key else "") + reason + more
        case _:
            return f"{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}"
