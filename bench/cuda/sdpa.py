#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The speed of PyTorch's own scaled_dot_product_attention over the shapes of cuda_bench: one new token, fp16, 8 KV heads, head_dim
128, contiguous K and V. The query heads of a group are given to it in both ways that it has, as enable_gqa and as query rows, and
the faster one counts. Prints microseconds (medians; in CUDA graphs, as cuda_bench) under the names of cuda_bench's rows, with
sdpa for the format, so that the two outputs can be laid side by side. Exit status 77, with a line, where PyTorch or its GPU is
missing.

    sdpa.py [quick] [--json FILE] [--device cpu]     (cpu: tiny shapes in float, to try the script)
"""
import argparse
import json
import sys
import time

HEADS, DIM = 8, 128


def on_cpu(work):
    """Seconds of `work`, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class OnGpu:
    """`runs` times `work` in a row as a graph: launching takes the CPU longer than a small shape takes the GPU."""

    def __init__(self, torch, work, runs):
        self.torch, self.runs, self.graph = torch, runs, torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # outside of the graph: what only the first calls do
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            for _ in range(runs):
                work()

    def __call__(self):
        """Seconds of one run."""
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / self.runs


def median_us(torch, device, work):
    """Median microseconds of `work`: five turns at least, thirty at most, about 50 ms."""
    turn, runs = (lambda: on_cpu(work)), 1
    if device == "cuda":
        once = OnGpu(torch, work, 1)
        once()
        runs = max(1, min(32, int(500e-6 / once())))
        turn = OnGpu(torch, work, runs)
    turn()
    times = []
    while len(times) < 5 or (len(times) < 30 and sum(times) * runs < 50e-3):
        times.append(turn())
    return 1e6 * sorted(times)[len(times) // 2]


def candidates(attention, q, k, v):
    """Both ways to give r query heads of each KV head; PyTorch before 2.5 has only the second one."""
    batch, heads, r, dim = q.shape
    rows = {"rows": lambda: attention(q, k, v)}
    grouped = q.reshape(batch, heads * r, 1, dim)

    def gqa():
        return attention(grouped, k, v, enable_gqa=True)

    try:
        gqa()
    except (TypeError, RuntimeError):
        return rows
    return {"enable_gqa": gqa, **rows}


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("mode", nargs="?", choices=["quick"])
    options.add_argument("--json", metavar="FILE")
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = options.parse_args()
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention
    except ImportError as error:
        print(f"skipped: no PyTorch 2 ({error})")
        return 77
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"skipped: PyTorch {torch.__version__} finds no CUDA device")
        return 77
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"PyTorch {torch.__version__}, {card}")
    if device == "cpu":
        depths, batches, kind = [64, 256], [1, 2], torch.float32
    elif options.mode == "quick":
        depths, batches, kind = [1024, 8192], [1, 8], torch.float16
    else:
        depths, batches, kind = [1024, 4096, 32768, 131072], [1, 8, 64], torch.float16

    rows = []
    for tokens in depths:
        for batch in batches:
            size = 2 * batch * HEADS * tokens * DIM * torch.finfo(kind).bits // 8
            if device == "cuda" and size > 0.6 * torch.cuda.mem_get_info()[0]:
                print(f"attention/sdpa/b{batch}/n{tokens} skipped: not enough memory")
                continue
            k, v = (torch.randn(batch, HEADS, tokens, DIM, dtype=kind, device=device) for _ in range(2))
            for r in (1, 4, 8):
                q = torch.randn(batch, HEADS, r, DIM, dtype=kind, device=device)
                times = {how: median_us(torch, device, work)
                         for how, work in candidates(scaled_dot_product_attention, q, k, v).items()}
                how = min(times, key=times.get)
                us, name = times[how], f"attention/sdpa/r{r}/b{batch}/n{tokens}"
                print(f"{name:44} {us:12.1f} us {size / us * 1e-3:9.0f} GB/s ({how})", flush=True)
                rows.append({"name": name, "us": round(us, 2), "bytes": size, "note": how})
            del k, v
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"card": card, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
