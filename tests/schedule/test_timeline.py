"""A table for Perfetto."""

import json

from dstrain.schedule.figures import StageCosts, play
from dstrain.schedule.pipelines.choose import make
from dstrain.schedule.timeline import events


def test_slots_as_events():
    pipeline = make("dualpipev", 2, 6)
    spans = play(pipeline, StageCosts.even(4, 1, 1, 1, pair=0.8))
    found = json.loads(json.dumps(list(events(pipeline, spans))))
    names = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert names == {0: "rank 0 (stages 0, 3)", 1: "rank 1 (stages 1, 2)"}
    for rank, own in enumerate(spans):
        slots = [event for event in found if event["ph"] == "X" and event["tid"] == rank]
        assert [event["name"] for event in slots] == [" & ".join(map(str, span.slot)) for span in own]
        assert [event["ts"] for event in slots] == [1000 * span.start_ms for span in own]
        # Slots of a row do not overlap, or Perfetto would nest them.
        ends = [event["ts"] + event["dur"] for event in slots]
        assert all(end <= after["ts"] + 1e-6 for end, after in zip(ends, slots[1:], strict=False))
    pair = next(event for event in found if event["name"].startswith("F") and "&" in event["name"])
    assert pair["cat"] == "forward & backward"
    assert set(pair["args"]) == {"forward", "backward"}
