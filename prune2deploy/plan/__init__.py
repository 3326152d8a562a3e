"""From scores and a latency budget to the channels that every axis keeps.

In reading order: ``plan`` (the value), ``alignment`` and ``probes`` (widths worth trying),
``work``, ``pairing``, ``identify``, ``costs``, ``overhead``, ``latency_model`` and
``latency_cache`` (what widths cost), ``sensitivity`` (what they are worth), ``choices``,
``terms``, ``evaluate``, ``search``, ``milp``, ``baselines``, ``allocate`` and ``filling``
(choosing them).
"""
