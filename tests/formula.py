"""Target profiles of the null backend, whose latency is a formula of the widths."""

import json


def formula_profile(threads=1, channel_multiple=8, precision="fp32", **options):
    """Text of a profile; ``options`` are those of the backend, channels come in steps of 8."""
    top = {
        "backend": "null",
        "device": "none",
        "channel_multiple": channel_multiple,
        "threads": threads,
        "precision": precision,
    }
    parts = (
        ("", {key: value for key, value in top.items() if value is not None}),
        ("[options]\n", {"step": 8, **options}),
        ("[measure]\n", {"min_seconds": 0.0, "max_seconds": 30.0}),
    )
    return "".join(
        head + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for head, table in parts
    )
