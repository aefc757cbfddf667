#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The speed of PyTorch's own scaled_dot_product_attention over the shapes of cuda_bench: one new token, fp16, 8 KV heads, head_dim
128, contiguous K and V. Prints microseconds (medians of CUDA events) under the names that cuda_bench gives its fp16 rows, so
that the two outputs can be laid side by side. Exit status 77, with a line, where PyTorch or its GPU is missing.

    sdpa.py [quick] [--json FILE] [--device cpu]     (cpu: tiny shapes, to try the script)
"""
import argparse
import json
import sys
import time

HEADS, DIM = 8, 128


def median_us(torch, device, work):
    times, spent = [], 0.0
    for turn in range(-2, 30):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            ms = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            work()
            ms = 1e3 * (time.perf_counter() - start)
        if turn >= 0:
            times.append(ms)
            spent += ms
        if turn >= 4 and spent > 50.0:
            break
    return 1e3 * sorted(times)[len(times) // 2]


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
                # The query heads of a group as query rows: what enable_gqa computes, without its copies of K and V.
                q = torch.randn(batch, HEADS, r, DIM, dtype=kind, device=device)
                us = median_us(torch, device, lambda: scaled_dot_product_attention(q, k, v))
                name = f"attention/sdpa/r{r}/b{batch}/n{tokens}"
                print(f"{name:44} {us:12.1f} us {size / us * 1e-3:9.0f} GB/s", flush=True)
                rows.append({"name": name, "us": round(us, 2), "bytes": size})
            del k, v
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"card": card, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
