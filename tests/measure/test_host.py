import json

from prune2deploy.measure import host


def test_the_vector_width_decides_the_channel_multiple():
    assert host.channel_multiple_of(frozenset({"avx2", "fma", "avx512f"})) == 16
    assert host.channel_multiple_of(frozenset({"avx2", "fma"})) == 8
    assert host.channel_multiple_of(frozenset({"asimd", "asimddp"})) == 8
    assert host.channel_multiple_of(frozenset()) == 8
    assert host.native_channel_multiple() in (8, 16)


def test_counters_only_grow():
    first = host.counters()
    sum(i * i for i in range(100_000))
    assert all(b >= a for a, b in zip(first, host.counters(), strict=True))


def test_the_fingerprint_is_plain_and_names_the_machine():
    found = host.fingerprint()
    assert found["machine"] and found["cores"] >= 1
    assert json.loads(json.dumps(found)) == found
