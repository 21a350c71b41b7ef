"""When the phases of a layer begin, from `llaisys-bench --trace FILE` of the whole-step prototype.

usage: timeline.py FILE

One line a phase and group of warps: microseconds since the last block finished the layer before, of the first, median and
last block, averaged over the layers behind the first four.
"""

import collections
import csv
import sys

EVENTS = 16  # of a layer, as the prototype marks them
NAMES = {
    0: "x normed",
    1: "qkv sent",
    2: "attention or merge done",
    3: "attention gathered",
    4: "o done",
    5: "x normed again",
    8: "gate_up row tile 0",
    9: "gate_up row tile 1",
    10: "gate_up row tile 2",
    11: "gate_up row tile 3",
    12: "gate_up row tile 4",
    6: "activations gathered",
    14: "down multiplied",
    7: "down done",
}

times = collections.defaultdict(list)
with open(sys.argv[1]) as file:
    for row in csv.DictReader(file):
        times[int(row["event"]), int(row["group"])].append(int(row["ns"]))
layers = max(event for event, _ in times) // EVENTS
for event, name in NAMES.items():
    for group in (0, 1):
        spans = []
        for layer in range(4, layers - 1):
            start = max(times[(layer - 1) * EVENTS + 7, 0])
            found = sorted(times.get((layer * EVENTS + event, group), ()))
            if found:
                spans.append([t - start for t in (found[0], found[len(found) // 2], found[-1])])
        if spans:
            means = [sum(column) / len(spans) / 1000 for column in zip(*spans)]
            print(
                f"{name:24s} group {group}  first {means[0]:6.2f}  median {means[1]:6.2f}  last {means[2]:6.2f} us"
            )
