"""A roofline of steps that llaisys-bench timed.

usage: roofline.py --svg OUT [--peak TFLOPS] FILE...

FILE: what `llaisys-bench --device nvidia --json` wrote, one a batch or a prompt. A point is a step: operations a byte that it
must read, and operations a second. The slanted roof is the plain read of the same runs (the highest), the flat one --peak: what the
GPU's tensor cores do at best (default 748: cuBLAS in PyTorch, bf16, 4096 x 17920 x 1536, H100).
"""

import argparse
import json
import math

WIDTH, HEIGHT, LEFT, BOTTOM = 760, 460, 70, 410


def points(run):
    """(label, operations a byte, TFLOP/s) of a run's decode step, and of its prompt where that has at least 512 tokens."""
    decode, replay, batch = run["decode"], run.get("replay", run["decode"]), run["batch"]
    yield f"{batch}", decode["flops"] / decode["bytes"], decode["flops"] / replay["ms"] / 1e9
    if run["context"] >= 512 and batch == 1:
        prompt = run["prefill"]
        yield (
            f"prompt of {run['context']}",
            prompt["flops"] / prompt["bytes"],
            prompt["flops"] / prompt["ms"] / 1e9,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--svg", required=True)
    parser.add_argument("--peak", type=float, default=748, help="TFLOP/s")
    args = parser.parse_args()
    runs = []
    for path in args.files:
        with open(path) as file:
            runs.append(json.load(file))
    read = max(run["plain_read_gbs"] for run in runs) / 1000  # TB/s
    found = sorted((point for run in runs for point in points(run)), key=lambda point: point[1])

    def x(intensity):
        return LEFT + (WIDTH - LEFT - 30) * (math.log10(intensity) + 0.3) / 4.3  # 0.5 to 10,000

    def y(tflops):
        return BOTTOM - (BOTTOM - 30) * math.log10(tflops) / 3.1  # 1 to 1,260

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(5):
        lines.append(
            f'<line x1="{x(10**power):.1f}" x2="{x(10**power):.1f}" y1="30" y2="{BOTTOM}" stroke="#eee"/>'
            f'<text x="{x(10**power):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{10**power:,}</text>'
        )
    for power in range(4):
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 30}" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" stroke="#eee"/>'
            f'<text x="{LEFT - 8}" y="{y(10**power) + 4:.1f}" text-anchor="end">{10**power:,}</text>'
        )
    ridge = args.peak / read
    lines.append(
        f'<path d="M{x(1 / read):.1f} {y(1):.1f} L{x(ridge):.1f} {y(args.peak):.1f} L{WIDTH - 30} {y(args.peak):.1f}" '
        'fill="none" stroke="#444" stroke-width="1.5"/>'
        f'<text x="{WIDTH - 34}" y="{y(args.peak) - 7:.1f}" text-anchor="end">{args.peak:.0f} TFLOP/s</text>'
        f'<text x="{x(3):.1f}" y="{y(3 * read) - 14:.1f}" text-anchor="end">{read:.2f} TB/s</text>'
    )
    print(f"{'':18s} operations a byte   TFLOP/s   of the roof")
    for label, intensity, tflops in found:
        roof = min(args.peak, intensity * read)
        color = "#b3273c" if label.startswith("prompt") else "#1f6fb5"
        lines.append(
            f'<circle cx="{x(intensity):.1f}" cy="{y(tflops):.1f}" r="4" fill="{color}"/>'
            f'<text x="{x(intensity) + 7:.1f}" y="{y(tflops) + 12:.1f}" fill="{color}">{label}</text>'
        )
        name = label if label.startswith("prompt") else f"decode, batch {label}"
        print(f"{name:18s} {intensity:17.1f} {tflops:9.1f} {100 * tflops / roof:11.1f}%")
    lines.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{BOTTOM + 38}" text-anchor="middle">operations a byte of weights and KV cache; '
        "points: decode by batch, and prompts</text>"
        f'<text x="14" y="20">TFLOP/s</text></svg>'
    )
    with open(args.svg, "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
