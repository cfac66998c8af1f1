"""The short form of tests/attacks: each attack for a quarter of a second, with victims of another user at work."""

import os
import sys

import harness
from harness import Skip, fails_without, slow, timeout, waits
from test_foreign import root_only

sys.path.insert(0, os.path.join(harness.ROOT, "tests", "attacks"))

import rig  # noqa: E402

SECONDS = 0.25


def attacks(module=None, names=None, turn=8):
    root_only()
    chosen = names or [name for name, (where, _) in rig.listed().items() if where == module]
    assert chosen
    results = rig.campaign(chosen, SECONDS, turn=min(turn, len(chosen)))
    faults = [f"{r['name']}: {fault}" for r in results for fault in r["faults"]]
    assert not faults, "kept waiting, or worse:\n" + "\n".join(faults)
    if all("skipped" in r["said"] for r in results):
        raise Skip(results[0]["said"]["skipped"])


@timeout(240)
def test_nothing_that_is_said_keeps_others_waiting():
    attacks("messages")


@slow
@timeout(240)
def test_nothing_that_is_sent_along_keeps_others_waiting():
    attacks("descriptors")


@slow
@timeout(240)
def test_nothing_in_shared_memory_keeps_others_waiting():
    attacks("memory")


@slow
@timeout(240)
def test_no_way_to_live_and_die_keeps_others_waiting():
    attacks("processes")


@slow
@timeout(240)
def test_nothing_in_a_user_namespace_keeps_others_waiting():
    attacks("namespaces")


@waits
@slow
@fails_without("foreign-descriptors-closed", message="kept waiting|did not|in vain|state D")
@timeout(120)
def test_a_filesystem_that_never_answers_would_keep_others_waiting():
    attacks(names=["a_file_whose_close_never_ends"])
