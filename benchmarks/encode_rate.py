"""Compare the two loops of the encode stage with the bare networks on a batch in memory.

    python benchmarks/encode_rate.py [--pictures 512] [--side 64] [--batch 64] [--rounds 3] [--threads 0]

Both sides run in one process in turns, and encode each picture and its mirror image in the stage's own
precision. Times are wall-clock times. On a busy machine read the share, not the rates.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch


def main():
    ap = argparse.ArgumentParser()
    for name, n in (('pictures', 512), ('side', 64), ('batch', 64), ('rounds', 3), ('threads', 0)):
        ap.add_argument(f'--{name}', type=int, default=n)
    a = ap.parse_args()
    import numpy as np

    from flowerdiff.data.encoding import encode_captions, encode_pictures, read_pictures
    from flowerdiff.garden.captions import garden_caption
    from flowerdiff.garden.garden import draw, sample_attributes
    from flowerdiff.models.components import encode_moments, load_autoencoder, load_text, pil_to_tensor
    from flowerdiff.services.hardware import bf16_is_fast

    torch.set_num_threads(a.threads or len(os.sched_getaffinity(0)))
    vae, text, folder = (
        load_autoencoder('garden').to(memory_format=torch.channels_last),
        load_text('garden'),
        Path(tempfile.mkdtemp()),
    )
    paths, texts = [folder / f'{i:06}.png' for i in range(a.pictures)], {}
    for i, p in enumerate(paths):
        what = sample_attributes(1, i)
        draw(what, 1, i, a.side).save(p, compress_level=1)
        texts |= {garden_caption(what, np.random.default_rng([i, k]))[0]: None for k in range(3)}
    texts, turn = list(texts), iter(range(10**6))
    batch = pil_to_tensor(read_pictures(paths[: a.batch], a.side)).contiguous(
        memory_format=torch.channels_last
    )
    ids = text.ids(texts[:256])

    def our_pictures():
        return sum(1 for _ in encode_pictures(vae, paths, a.side, folder / f'p{next(turn)}', a.batch))

    def our_texts():
        return sum(1 for _ in encode_captions(text, texts, folder / f't{next(turn)}'))

    def bare_pictures():
        n = a.pictures // a.batch
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=bf16_is_fast()):
            for _ in range(n):
                encode_moments(vae, batch), encode_moments(vae, batch.flip(-1))
        return n * a.batch

    def bare_texts():
        n = max(1, len(texts) // len(ids))
        with torch.inference_mode():
            for _ in range(n):
                text.model(ids)
        return n * len(ids)

    def rate(f):
        start = time.perf_counter()
        n = f()
        return n / (time.perf_counter() - start)

    precision = 'bf16' if bf16_is_fast() else 'fp32'
    print(f'| {torch.get_num_threads()} threads, {precision} | ours, per second | bare, per second | share |')
    print('|---|---|---|---|')
    seconds = 0.0
    for what, ours, bare, full in (
        (f'pictures with mirror, {a.side} px', our_pictures, bare_pictures, 6000),
        ('captions', our_texts, bare_texts, 16000),
    ):
        bare()
        pairs = [(rate(ours), rate(bare)) for _ in range(a.rounds)]
        us, them = (statistics.median(p[i] for p in pairs) for i in (0, 1))
        seconds += full / us
        print(
            f'| {what} | {us:.0f} | {them:.0f} | {statistics.median(u / b for u, b in pairs):.0%} |',
            flush=True,
        )
    print(f'\nthe garden (6,000 pictures, 16,000 different captions) at these rates: {seconds:.0f} s')


if __name__ == '__main__':
    main()
