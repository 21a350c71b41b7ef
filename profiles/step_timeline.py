"""When the kernels of a decode step run, from `llaisys-bench --device nvidia --trace FILE` of a build with -Dstep_trace=true.

usage: step_timeline.py FILE

Per kernel of a layer, averaged over the layers but the first and the last: microseconds since the end of the layer before.
`began`: its blocks were on an SM (first, median, last); `free`: the wait for the kernels before was over; `staged`: the
activations were in shared memory; `ended`: first, median, last block.
"""

import collections
import csv
import sys

EVENTS = ("began", "free", "staged", "ended")

nodes = collections.defaultdict(list)
names = {}
layers = {}
with open(sys.argv[1]) as file:
    for row in csv.DictReader(file):
        node = int(row["node"])
        nodes[node].append({event: int(row[event]) for event in EVENTS} | {"sm": int(row["sm"])})
        names[node], layers[node] = row["name"], int(row["layer"])

ends = {node: max((b["ended"] for b in blocks), default=0) for node, blocks in nodes.items()}
last_layer = max(layers.values())
spans = collections.defaultdict(list)
lengths = []
previous = {layers[n]: ends[n] for n in nodes if names[n] == "down"}
for node, blocks in sorted(nodes.items()):
    layer, name = layers[node], names[node]
    if name not in ("qkv", "attention", "o", "gate_up", "down") or not 1 <= layer < last_layer:
        continue
    origin = previous[layer - 1]
    if name == "down":
        lengths.append(ends[node] - origin)
    worked = [b for b in blocks if b["ended"]]
    line = [len(worked)]
    for event in EVENTS:
        found = sorted(b[event] - origin for b in worked if b[event])
        line += [found[0], found[len(found) // 2], found[-1]] if found else [0, 0, 0]
    spans[name].append(line)
print(f"{'':10s} blocks " + "".join(f"{e + ' first':>15s}  median    last" for e in EVENTS))
for name, lines in spans.items():
    mean = [sum(column) / len(lines) for column in zip(*lines)]
    cells = "".join(
        f"{mean[1 + 3 * i] / 1000:15.2f}{mean[2 + 3 * i] / 1000:8.2f}{mean[3 + 3 * i] / 1000:8.2f}"
        for i in range(len(EVENTS))
    )
    print(f"{name:10s} {mean[0]:6.0f} {cells}")
print(f"a layer takes {sum(lengths) / len(lengths) / 1000:.2f} us")
