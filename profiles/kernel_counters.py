"""Counters of a step's kernels, by Nsight Compute: a line a kernel and launch configuration.

usage: kernel_counters.py [--csv OUT] [--ncu PATH] [--samples N] COMMAND...
e.g.   kernel_counters.py --csv kernels.csv build/llaisys-bench --device nvidia --context 256 --new 4 --repeat 1 --batch 64

ncu runs every sampled kernel by itself, several times, between others that it does not touch; so `us` knows no overlap with
the kernel before and no weights that came ahead: a step takes less than the sum. It leaves the clocks and the caches alone.
Medians of N launches (default 3) of each configuration, the first eight of which are skipped. `read`: bytes from the device's
memory, and that over the time; `L2`: hits of all sectors asked for; `warps`: active, of the SM's limit.
"""

import argparse
import collections
import csv
import io
import re
import statistics
import subprocess
import sys

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "read",
    "lts__t_sector_hit_rate.pct": "L2",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block_dynamic": "shared",
}
# ncu --print-units base: nanoseconds, bytes, percent
COLUMNS = ("us", "read", "GB/s", "L2", "SM", "warps", "registers", "shared")


def profile(ncu, samples, command):
    """ncu's table, as its CSV prints it."""
    flags = f"""--graph-profiling node --clock-control none --cache-control none --filter-mode per-launch-config
        --launch-skip 8 --launch-count {samples} --page raw --csv --print-units base"""
    words = [ncu, *flags.split(), "--metrics", ",".join(METRICS), *command]
    done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def short(name):
    """A kernel's name without its namespaces, and of its arguments only the template's."""
    name = re.sub(r"<unnamed>::|\(anonymous namespace\)::|^void ", "", name)
    return re.sub(r"\((?!int\)|bool\)|Epilogue\)).*$", "", name)


def read(text):
    """{(kernel, grid, block): [{column: value}]}; lines before ncu's header are the program's own."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        sys.exit(f"ncu printed no table:\n{text[-2000:]}")
    kernels = collections.defaultdict(list)
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if not row["ID"].isdigit():  # the line of units
            continue
        values = {to: float(row[name].replace(",", "")) for name, to in METRICS.items()}
        values["GB/s"] = values["read"] / values["us"]  # bytes a nanosecond
        values["us"] /= 1000
        kernels[short(row["Kernel Name"]), row["Grid Size"], row["Block Size"]].append(values)
    return kernels


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--csv")
    parser.add_argument("--ncu", default="ncu")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("which program?")
    table = [
        [*key, len(rows), *(statistics.median(row[column] for row in rows) for column in COLUMNS)]
        for key, rows in read(profile(args.ncu, args.samples, args.command)).items()
    ]
    header = ("kernel", "grid", "block", "launches", *COLUMNS)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([header, *table])
    print(f"{header[0]:56s} {header[1]:>14s}" + "".join(f"{name:>10s}" for name in header[3:]))
    for kernel, grid, _, count, *values in table:
        cells = "".join(f"{value:10.1f}" if value < 1e4 else f"{value:10.3g}" for value in values)
        print(f"{kernel[:56]:56s} {grid:>14s}{count:10d}{cells}")


if __name__ == "__main__":
    main()
