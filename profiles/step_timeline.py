"""When the kernels of a decode step run, from `llaisys-bench --device nvidia --trace FILE` of a build with -Dstep_trace=true.

usage: step_timeline.py FILE [--svg OUT] [--layer N]

Per kernel of a layer, averaged over the layers but the first and the last: microseconds since the end of the layer before.
`began`: its blocks were on an SM (first, median, last); `free`: the wait for the kernels before was over; `staged`: the
activations were in shared memory; `ended`: first, median, last block. --svg draws one layer (the middle one): a line a block,
light while it waits and fetches weights, darker while it fetches activations, dark while it works.
"""

import argparse
import collections
import csv

EVENTS = ("began", "free", "staged", "ended")
KERNELS = ("qkv", "attention", "o", "gate_up", "down")
COLORS = {  # waits, fetches activations, works
    "qkv": ("#cfe3f7", "#7fb2e5", "#1f6fb5"),
    "attention": ("#f9ddc4", "#efaa6a", "#c8641b"),
    "o": ("#d3efd3", "#86cf86", "#2e8b2e"),
    "gate_up": ("#e6daf3", "#b79bdc", "#6c3fab"),
    "down": ("#f7d3d8", "#e58a97", "#b3273c"),
}


def read(path):
    """{(kernel, layer): [{event: ns, 0 where it was not noted}]}, of the blocks that worked."""
    blocks = collections.defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["name"] in KERNELS and int(row["ended"]):
                blocks[row["name"], int(row["layer"])].append(
                    {event: int(row[event]) for event in EVENTS}
                )
    return blocks


def end_of(blocks, layer):
    """When the layer's last kernel has ended."""
    return max(block["ended"] for block in blocks["down", layer])


def table(blocks, layers):
    print(
        f"{'':10s} blocks "
        + "".join(f"{event + ' first':>15s}  median    last" for event in EVENTS)
    )
    for name in KERNELS:
        lines = []
        for layer in layers:
            origin, line = end_of(blocks, layer - 1), [len(blocks[name, layer])]
            for event in EVENTS:
                found = sorted(b[event] - origin for b in blocks[name, layer] if b[event])
                line += [found[0], found[len(found) // 2], found[-1]] if found else [0, 0, 0]
            lines.append(line)
        mean = [sum(column) / len(lines) for column in zip(*lines)]
        cells = "".join(
            f"{mean[1 + 3 * i] / 1000:15.2f}{mean[2 + 3 * i] / 1000:8.2f}{mean[3 + 3 * i] / 1000:8.2f}"
            for i in range(len(EVENTS))
        )
        print(f"{name:10s} {mean[0]:6.0f} {cells}")
    length = sum(end_of(blocks, layer) - end_of(blocks, layer - 1) for layer in layers) / len(
        layers
    )
    print(f"a layer takes {length / 1000:.2f} us")


def picture(blocks, layer, path):
    origin, end = end_of(blocks, layer - 1), end_of(blocks, layer)
    left, right, scale, top = -15000, end - origin + 2000, 0.022, 40  # ns, ns, pixels a ns, pixels
    width = 110 + (right - left) * scale
    lines, y = [], top
    for name in KERNELS:
        rows = sorted(blocks[name, layer], key=lambda b: (b["began"], b["ended"]))
        step = max(0.7, 24 / len(rows))
        lines.append(
            f'<text x="8" y="{y + step * len(rows) / 2 + 4:.1f}">{name}, {len(rows)}</text>'
        )
        for block in rows:
            times = [block[event] for event in EVENTS]
            times[2] = times[2] or times[1]  # without activations to fetch
            for color, begin, until in zip(COLORS[name], times, times[1:]):
                begin = max(begin - origin, left)
                if until - origin > begin:
                    lines.append(
                        f'<rect x="{100 + (begin - left) * scale:.1f}" y="{y:.1f}" fill="{color}" '
                        f'width="{(until - origin - begin) * scale:.1f}" height="{step:.2f}"/>'
                    )
            y += step
        y += 10
    axis = []
    for us in range(left // 1000, right // 1000 + 1, 5):
        x = 100 + (us * 1000 - left) * scale
        axis.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{y:.1f}" stroke="#ddd"/>')
        axis.append(f'<text x="{x:.1f}" y="{top - 14}" text-anchor="middle">{us} us</text>')
    with open(path, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y + 8:.0f}" '
            'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        )
        file.write("\n".join(axis + lines) + "\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--svg", help="draw a layer")
    parser.add_argument("--layer", type=int, help="the one to draw")
    args = parser.parse_args()
    blocks = read(args.file)
    last = max(layer for _, layer in blocks)
    table(blocks, range(1, last))
    if args.svg:
        picture(blocks, args.layer or last // 2, args.svg)


if __name__ == "__main__":
    main()
