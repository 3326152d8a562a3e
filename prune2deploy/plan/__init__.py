"""From scores and a latency budget to the channels that every axis keeps.

In reading order: ``plan`` (the value), ``alignment`` and ``probes`` (widths worth trying),
``work``, ``identify``, ``costs``, ``latency_model`` and ``latency_cache`` (what widths cost),
``sensitivity`` (what they are worth), ``choices``, ``evaluate``, ``search``, ``milp``,
``baselines`` and ``allocate`` (choosing them).
"""
